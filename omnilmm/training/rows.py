"""Sequences about the same pictures as one tree of tokens, and batches of such trees.

Questions about one picture begin with the same tokens: its 64 vectors and the system message. A `Row` stores every
shared beginning once, as a tree in which each token sees its ancestors and itself. The numbers are those of training
on the separate sequences; the work is a fraction, for a picture with eight short questions about a quarter.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from omnilmm.training.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """A tree of L tokens over some pictures.

    `ids`, `positions` (depth in the tree) and `parents` (-1 for the root) are (L,) int64, parents first. Position i
    of `target_nodes` (M,) must predict `target_ids` (M,): several targets may hang on one token. `spans` are
    (first token, number of tokens, index into `pictures`). `pictures` are squares as `PreparedImage` has them,
    uint8 (side, side, 3). `facts` says what lies in them (`grounding`), (pictures, cells, facts) uint8, or is None.
    """

    ids: np.ndarray
    positions: np.ndarray
    parents: np.ndarray
    target_nodes: np.ndarray
    target_ids: np.ndarray
    spans: tuple[tuple[int, int, int], ...]
    pictures: tuple[np.ndarray, ...]
    facts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def visible(self) -> np.ndarray:
        """(L, L) bool: whether the token of a line may look at that of a column."""
        seen = np.eye(len(self), dtype=bool)
        for start, stop, parent in self._runs():
            if parent >= 0:
                seen[start:stop] |= seen[parent]
            seen[start:stop, start:stop] |= np.tri(stop - start, dtype=bool)
        return seen

    def _runs(self) -> Iterable[tuple[int, int, int]]:
        """(start, stop, parent of start) of stretches in which every token follows the one before it."""
        breaks = np.flatnonzero(self.parents != np.arange(len(self)) - 1).tolist()
        starts = [0, *(index for index in breaks if index)]
        for start, stop in pairwise((*starts, len(self)) if len(self) else ()):
            yield start, stop, int(self.parents[start])


def make_row(
    sequences: SequenceOf[Sequence], pictures: SequenceOf[np.ndarray] = (), *, facts: np.ndarray | None = None
) -> Row:
    """One row from sequences that are all about `pictures`, in that order. The last token of a sequence is only ever
    a target, so it takes no place unless another sequence goes on behind it. Without sequences a row only shows.
    """
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    targets: list[tuple[int, int]] = []
    spans: dict[tuple[int, int, int], None] = {}
    for sequence in sequences:
        node, path = -1, []
        for depth, token in enumerate(sequence.ids[:-1]):
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(ids)
                ids.append(token)
                parents.append(node)
                positions.append(depth)
            node = child
            path.append(node)
        first = sequence.answer_start
        targets += zip(path[first - 1 :], sequence.ids[first:], strict=True)
        for span in sequence.spans:  # inside a span the tree never branches, so its tokens stand side by side
            spans[path[span.start], span.length, span.image] = None
    return Row(
        ids=np.array(ids, np.int64),
        positions=np.array(positions, np.int64),
        parents=np.array(parents, np.int64),
        target_nodes=np.array([node for node, _ in targets], np.int64),
        target_ids=np.array([wanted for _, wanted in targets], np.int64),
        spans=tuple(spans),
        pictures=tuple(pictures),
        facts=facts,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows, T tokens in all, side by side, as the language model takes them; the last few may be filler.

    `slots` (T,) are places in a (B, longest) rectangle; `visible` (B, 1, longest, longest) bool says there who may
    see whom (places without a token, and filler, see only themselves). Picture vectors (P * num_query, hidden), in the
    order `picture_rows`, go to tokens `picture_tokens`. `squares` is (P, side, side, 3) uint8.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    visible: Tensor
    target_tokens: Tensor
    target_ids: Tensor
    picture_tokens: Tensor
    picture_rows: Tensor
    squares: Tensor
    facts: Tensor | None

    @property
    def num_targets(self) -> int:
        return len(self.target_ids)


def collate(rows: SequenceOf[Row], *, fill: bool = False) -> Batch:
    """Rows side by side, on the CPU. Facts are kept if every row with pictures has them. `fill` adds tokens that
    nobody sees until the batch has one of few sizes: for loops that collate without end."""
    longest = _rounded_up(max(map(len, rows)), _ROW_STEP if fill else 1)
    starts = np.cumsum([0, *map(len, rows)])
    filler = _filler(rows, longest) if fill else np.empty(0, np.int64)
    first_picture = np.cumsum([0, *(len(row.pictures) for row in rows)])
    visible = np.broadcast_to(np.eye(longest, dtype=bool), (len(rows), longest, longest)).copy()
    tokens, vectors = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for index, row in enumerate(rows):
        visible[index, : len(row), : len(row)] = row.visible()
        for start, length, picture in row.spans:
            tokens.append(starts[index] + start + np.arange(length))
            vectors.append((first_picture[index] + picture) * length + np.arange(length))
    squares = [square for row in rows for square in row.pictures]
    facts = [row.facts for row in rows if row.pictures]
    has_facts = bool(facts) and all(fact is not None for fact in facts)
    return Batch(
        ids=_joined([*(row.ids for row in rows), np.zeros_like(filler)]),
        positions=_joined([*(row.positions for row in rows), np.zeros_like(filler)]),
        slots=_joined([*(index * longest + np.arange(len(row)) for index, row in enumerate(rows)), filler]),
        visible=torch.from_numpy(visible).unsqueeze(1),
        target_tokens=_joined([starts[index] + row.target_nodes for index, row in enumerate(rows)]),
        target_ids=_joined([row.target_ids for row in rows]),
        picture_tokens=_joined(tokens),
        picture_rows=_joined(vectors),
        squares=torch.from_numpy(np.stack(squares)) if squares else torch.empty(0, 0, 0, 3, dtype=torch.uint8),
        facts=_joined([fact for fact in facts if fact is not None]) if has_facts else None,
    )


_ROW_STEP, _TOKEN_STEP = 32, 512
"""Rows and batches come in few lengths only. For every new shape of a product torch's CPU library makes and keeps a
program of its own, and the allocator finds no block that fits: with lengths as they come a run grows by gigabytes."""


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _filler(rows: SequenceOf[Row], longest: int) -> np.ndarray:
    """Slots behind the ends of rows for tokens that only fill the batch up: nobody sees them and they teach nothing."""
    num_tokens = sum(map(len, rows))
    free = np.concatenate([index * longest + np.arange(len(row), longest) for index, row in enumerate(rows)])
    return free[: _rounded_up(num_tokens, _TOKEN_STEP) - num_tokens]


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
