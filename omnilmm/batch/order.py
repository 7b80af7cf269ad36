"""In which order the lines of a batch run: those about one picture together, and within them those that begin alike.

So each picture is encoded once however small the cache is, its lines meet the same decoder while its keys and values
are still there, and a shared beginning of the prompt is computed once. Groups keep the order in which the file first
mentions them, so that progress follows the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

TAIL_CHARS = 128
CONVERSATION = ("instructions", "messages", "input", "prompt")
"""The members of a request body in which pictures and words stand, over all endpoints."""


@dataclass(frozen=True, slots=True)
class Place:
    """What decides where a line runs: digests of its first picture (empty without one), of all its pictures, and of all
    its texts but the last, and the beginning of the last."""

    picture: bytes
    pictures: bytes
    opening: bytes
    tail: str


class Placed(Protocol):
    @property
    def place(self) -> Place: ...


P = TypeVar("P", bound=Placed)


def place_of(body: Mapping[str, object]) -> Place:
    """The place of a request body. Two pictures are the same if they are written the same, white space aside."""
    pictures: list[str] = []
    texts = [""]
    for member in CONVERSATION:
        for kind, value in _pieces(body.get(member)):
            (pictures if kind == "picture" else texts).append(value)
    first = _digest(pictures[:1]) if pictures else b""
    return Place(first, _digest(pictures), _digest(texts[:-1]), texts[-1][:TAIL_CHARS])


def in_order(lines: Iterable[P]) -> list[P]:
    """The lines, in the order in which they should run."""
    listed = list(lines)
    first_seen: dict[bytes, int] = {}
    for position, line in enumerate(listed):
        for digest in (line.place.picture, line.place.pictures, line.place.opening):
            first_seen.setdefault(digest, position)

    def rank(line: P) -> tuple[int, int, int, str]:
        place = line.place
        return first_seen[place.picture], first_seen[place.pictures], first_seen[place.opening], place.tail

    return sorted(listed, key=rank)


def _pieces(value: object) -> Iterator[tuple[str, str]]:
    """("picture" or "text", string) of everything a model would read, in order."""
    if isinstance(value, str):
        yield "text", value
    elif isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, Mapping):
        for name in ("content", "text"):
            yield from _pieces(value.get(name))
        image = value.get("image_url")
        url = image.get("url", image.get("file_id")) if isinstance(image, Mapping) else image
        for reference in (url, value.get("file_id")):
            if isinstance(reference, str):
                yield "picture", reference


def _digest(strings: Iterable[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for string in strings:
        written = "".join(string.split()).encode("utf-8", "surrogatepass")
        digest.update(len(written).to_bytes(8, "big") + written)
    return digest.digest()
