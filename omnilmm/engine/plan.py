"""One step on paper: what the scheduler decided, and what the runner found. Plain values, no tensor.

A plan holds all the runner needs, so that the runner keeps no state of its own about any sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from omnilmm.errors import OmniError
from omnilmm.messages import Embedding, Sampling, TokenLogprob


@dataclass(frozen=True, slots=True)
class PictureSlice:
    """Vectors of a picture that take the place of token embeddings in a row."""

    offset: int  # first token of the row they replace
    first: int  # a chunk may begin in the middle of a picture: its first vector
    count: int  # and how many of its vectors fall into the row
    length: int  # positions of the whole picture, which the embedding must match
    embedding: Embedding


@dataclass(frozen=True, slots=True)
class Draw:
    """How the token after a row is chosen."""

    sampling: Sampling
    position: int  # of the new token in the generated text: the generator's counter, and what min_tokens counts
    generated: tuple[int, ...] = ()  # ids under presence and frequency penalty; empty where neither is on
    seen: tuple[int, ...] = ()  # ids under repetition penalty; empty where it is off
    allowed: bytes | None = None  # the only ids it may be: byte i holds those from 8 * i on, lowest bit first; 4n bytes


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens that one sequence gets computed in this step: one when it decodes, a chunk when it prefills."""

    sequence_id: int  # results come back under this name
    ids: tuple[int, ...]  # the tokens to compute
    start: int  # position of the first; everything before it is in the pool already
    block_ids: tuple[int, ...]  # blocks of positions [0, start + len(ids)): where to read, and where to write
    pictures: tuple[PictureSlice, ...] = ()  # embeddings to use in place of those of the ids
    ranks: range | None = None  # rank rows of the sequence's adapter in the pool; None for the model itself
    draw: Draw | None = None  # None where the chunk ends before the sequence does: nothing to draw yet

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class Needs:
    """A sequence cannot go on without the vectors of these pictures, and asks for the first time."""

    sequence_id: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    rows: tuple[Row, ...] = ()
    needs: tuple[Needs, ...] = ()  # found out while choosing; told to the owner with the step's results

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


ShouldYield = Callable[[], bool]
"""Asked while a step is computed: whether it is to be given up. Cheap, and never blocks."""


def never() -> bool:
    return False


class StepYielded(Exception):
    """A step was given up half-way. Nothing came of it: what it wrote into the pool will be written again."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A new token, with its log-probability if the call asked for it."""

    id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a plan's rows, by sequence. A row in neither map was computed and drew nothing."""

    drawn: Mapping[int, Drawn] = field(default_factory=dict)
    failures: Mapping[int, OmniError] = field(default_factory=dict)  # these sequences only; the others are unharmed
