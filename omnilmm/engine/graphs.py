"""Decode steps whose tensors stay in place, so that a CUDA graph can replay them; one for each of a few batch sizes.

A plan of decodes is padded to the next size. The rows of padding are decodes too: of token 0 at position 0, in a block
of nobody's, so whatever they write and read is theirs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from omnilmm.engine.batch import Batch
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.paged import DECODE_SIZES, PagedAttention, Runs
from omnilmm.engine.plan import Row
from omnilmm.models.capture import CapturedStep, bucket_of, graph_memory
from omnilmm.models.decoder import LanguageModel

Decoded = tuple[Tensor, Tensor]
"""Hidden states (size, hidden) after the final norm, and logits (size, vocab) float32."""

Recorder = Callable[[Callable[[], Decoded]], Callable[[], Decoded]]
"""Makes of a step one that is quicker to call."""


class StaticDecode:
    """A decode step of `size` rows: `load` puts their numbers into `inputs`, `compute` reads them from there.

    Args:
        scratch_block: a block of the pool that no sequence is given.
    """

    def __init__(
        self, model: LanguageModel, kv: PagedKV, attention: PagedAttention, *, size: int, scratch_block: int
    ) -> None:
        self._model, self._kv, self._attention = model, kv, attention
        self._scratch_block = scratch_block
        device = model.embedding.weight.device
        # A row: the token's id, its position, and the blocks of its sequence.
        self._staged = torch.zeros(size, 2 + attention.max_blocks, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.load([])
        self.inputs = self._staged.to(device, copy=True)

    def load(self, rows: Sequence[Row]) -> None:
        """Write down at most `size` rows of one token each; `send` brings them to the device."""
        staged = self._staged.numpy()
        staged[len(rows) :, :2] = 0
        staged[len(rows) :, 2:] = self._scratch_block
        for line, row in zip(staged, rows, strict=False):
            line[0], line[1] = row.ids[0], row.start
            line[2 : 2 + len(row.block_ids)] = row.block_ids

    def send(self) -> None:
        """Bring what was loaded to where `compute` reads it. The last step must be over: its numbers are gone."""
        self.inputs.copy_(self._staged, non_blocking=True)

    def compute(self) -> Decoded:
        """Write keys and values of the rows to the pool, and return what comes of them."""
        ids, positions, block_ids = self.inputs[:, 0], self.inputs[:, 1], self.inputs[:, 2:]
        size = self._kv.block_size
        last = positions // size  # (size,): where in its sequence the block is that the token goes to
        slots = block_ids.gather(1, last.long()[:, None]).squeeze(1).long() * size + positions % size
        runs = Runs(block_ids, last + 1, positions)
        attend = self._attention.decode(self._kv, slots, runs)
        hidden = self._model(self._model.embed(ids.long()), positions.long(), attend)
        return hidden, self._model.logits(hidden)


class DecodeGraphs:
    """Static decode steps of all sizes up to the largest that is needed, ready to run.

    Args:
        record: captures a step; for tests, may hand it back as it is.
    """

    def __init__(
        self,
        model: LanguageModel,
        kv: PagedKV,
        attention: PagedAttention,
        *,
        max_rows: int,
        scratch_block: int,
        record: Recorder | None = None,
    ) -> None:
        self._kv = kv
        needed = bucket_of(max_rows, DECODE_SIZES) or DECODE_SIZES[-1]
        self._sizes = tuple(size for size in DECODE_SIZES if size <= needed)
        self._static = {
            size: StaticDecode(model, kv, attention, size=size, scratch_block=scratch_block) for size in self._sizes
        }
        if record is None:
            record = partial(CapturedStep, memory=graph_memory())
        with torch.inference_mode():  # the largest first: the others find room in its memory
            self._steps = {size: record(self._static[size].compute) for size in reversed(self._sizes)}

    def can_run(self, rows: Sequence[Row]) -> bool:
        """Whether these rows are decodes of the model itself, and no more than the largest size."""
        return len(rows) <= self._sizes[-1] and all(
            row.num_tokens == 1 and not row.pictures and row.ranks is None for row in rows
        )

    def run(self, batch: Batch) -> Decoded:
        """Hidden states of the rows, (num_rows, hidden), and logits of those that draw, (num_drawing, vocab) float32.

        Both are overwritten by the next run. The batch's own tensors may be on any device.
        """
        size = bucket_of(len(batch.rows), self._sizes)
        assert size is not None, "more rows than the largest size"
        if len(batch.begun):
            self._kv.begin(batch.begun.to(self._static[size].inputs.device))
        self._static[size].load(batch.rows)
        self._static[size].send()
        hidden, logits = self._steps[size]()
        hidden, logits = hidden[: len(batch.rows)], logits[: len(batch.rows)]
        if len(batch.drawing) < len(batch.rows):
            logits = logits[batch.drawing.to(logits.device)]
        return hidden, logits
