"""The pictures of one sequence: where they lie, and which of their vectors are here.

A picture is missed only while its positions are not all in the KV pool: keys and values make its vectors needless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from omnilmm.engine.blocks import PictureMark
from omnilmm.engine.plan import PictureSlice
from omnilmm.messages import Embedding, ImageInput


class Pictures:
    """Spans in order of position, and embeddings by key: those that travelled with the call, and those supplied."""

    def __init__(self, images: Sequence[ImageInput]) -> None:
        self._images = images
        self._embeddings = {image.key: image.embedding for image in images if image.embedding is not None}
        self._asked: set[str] = set()

    def supply(self, key: str, embedding: Embedding) -> None:
        """Keep vectors that were asked for, to the end: preemption may need them again."""
        self._embeddings.setdefault(key, embedding)

    def first_missing(self, num_computed: int) -> int | None:
        """Start of the first picture that cannot be computed, the first `num_computed` positions being in the pool."""
        return next((image.start for image in self._missing(num_computed)), None)

    def take_unasked(self, num_computed: int) -> tuple[str, ...]:
        """Keys of missing pictures that nobody was asked for yet; they count as asked from now on."""
        keys = dict.fromkeys(image.key for image in self._missing(num_computed))
        unasked = tuple(key for key in keys if key not in self._asked)
        self._asked.update(unasked)
        return unasked

    def indices_within(self, num_computed: int) -> tuple[int, ...]:
        """Indices of the pictures whose positions are all among the first `num_computed`."""
        return tuple(index for index, image in enumerate(self._images) if _end(image) <= num_computed)

    def marks(self, start: int, end: int) -> list[PictureMark]:
        """What the digest of a block of positions [start, end) must say about pictures."""
        return [
            PictureMark(image.key, image.start - start, image.length)
            for image in self._images
            if image.start < end and _end(image) > start
        ]

    def slices(self, start: int, end: int) -> Iterator[PictureSlice]:
        """Vectors for the positions [start, end), all of which are here."""
        for image in self._images:
            first, last = max(start, image.start), min(end, _end(image))
            if first < last:
                yield PictureSlice(
                    offset=first - start,
                    first=first - image.start,
                    count=last - first,
                    length=image.length,
                    embedding=self._embeddings[image.key],
                )

    def _missing(self, num_computed: int) -> Iterator[ImageInput]:
        for image in self._images:
            if _end(image) > num_computed and image.key not in self._embeddings:
                yield image


def _end(image: ImageInput) -> int:
    return image.start + image.length
