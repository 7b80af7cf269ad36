"""Where rows come from, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from omnilmm.cache.memory import MemoryTier
from omnilmm.config import ImageLimits, ImagePolicy
from omnilmm.errors import ConfigError, InvalidRequest
from omnilmm.image.transform import prepare
from omnilmm.training.config import JsonlConfig
from omnilmm.training.records import Record, read_records
from omnilmm.training.rows import Row, make_row
from omnilmm.training.sequences import Sequence as TokenSequence
from omnilmm.training.sequences import SequenceMaker


class RowSource(Protocol):
    """Rows by number. The same arguments give the same row, in any process."""

    num_rows: int | None
    """How many there are before they repeat; None where they never do."""

    num_facts: int
    """Facts per cell that the rows tell of their pictures; 0 if they tell none."""

    def row(self, index: int, step: int) -> Row:
        """Row `index`, as it is at this step of the run."""
        ...


def row_index(position: int, num_rows: int | None, seed: int) -> int:
    """The row at `position` of a run: every row once in each round, in an order of its own for every round."""
    if num_rows is None:
        return position
    round_, place = divmod(position, num_rows)
    return int(np.random.default_rng((seed, round_)).permutation(num_rows)[place])


class JsonlSource:
    """Records of JSONL files. Texts are read and encoded at once, pictures when their row is needed.

    Args:
        paths: the files.
        maker, policy: of the model that learns.
        settings: what to leave out, and how to group.

    Raises:
        ConfigError: a line is not a record, a picture is missing, or nothing is left.
    """

    num_facts = 0

    def __init__(
        self, paths: Sequence[Path], *, maker: SequenceMaker, policy: ImagePolicy, settings: JsonlConfig
    ) -> None:
        self._policy = policy
        self._cache: MemoryTier[np.ndarray] = MemoryTier(settings.picture_cache_bytes)
        self.num_left_out = 0
        entries = [entry for path in paths for entry in self._entries(path, maker, settings.max_tokens)]
        self._rows = [*_grouped(entries, settings.max_group)]
        if not self._rows:
            raise ConfigError("The files hold no conversation that is short enough.", param="jsonl")
        self.num_rows: int | None = len(self._rows)

    def row(self, index: int, step: int) -> Row:
        pictures, sequences = self._rows[index]
        return make_row(sequences, [self._square(path) for path in pictures])

    def _entries(
        self, path: Path, maker: SequenceMaker, max_tokens: int
    ) -> Iterator[tuple[Record, tuple[TokenSequence, ...]]]:
        for record in read_records(path):
            for picture in record.pictures:
                if not picture.is_file():
                    raise ConfigError(f"{path.name}: the picture {picture.name} of record {record.name} is missing.")
            try:
                sequences = maker.sequences(record.conversation)
            except (ConfigError, InvalidRequest) as error:
                raise ConfigError(f"{path.name}: record {record.name}: {error.message}") from None
            if max(len(sequence.ids) for sequence in sequences) > max_tokens:
                self.num_left_out += 1
            else:
                yield record, sequences

    def _square(self, path: Path) -> np.ndarray:
        square = self._cache.get(str(path))
        if square is None:
            side = self._policy.side
            try:
                prepared = prepare(path.read_bytes(), policy=self._policy, limits=ImageLimits(), param=path.name)
            except (OSError, InvalidRequest) as error:
                raise ConfigError(f"The picture {path.name} cannot be used.") from error
            square = np.frombuffer(prepared.square, np.uint8).reshape(side, side, 3)
            self._cache.put(str(path), square, square.nbytes)
        return square


_Grouped = tuple[tuple[Path, ...], tuple[TokenSequence, ...]]


def _grouped(entries: Sequence[tuple[Record, tuple[TokenSequence, ...]]], max_group: int) -> Iterator[_Grouped]:
    """Neighbours about the same pictures, together. Conversations without pictures share too little to be grouped."""
    group: list[tuple[Record, tuple[TokenSequence, ...]]] = []
    for entry, following in pairwise([*entries, None]):
        assert entry is not None
        group.append(entry)
        pictures = entry[0].pictures
        if following is None or not pictures or following[0].pictures != pictures or len(group) == max_group:
            yield pictures, tuple(sequence for _, sequences in group for sequence in sequences)
            group = []
