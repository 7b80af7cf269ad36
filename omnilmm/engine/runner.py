"""The only one that touches the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from omnilmm.config import EngineConfig
from omnilmm.engine.backend import Backend, pick_backend
from omnilmm.engine.batch import Batch, build_batch
from omnilmm.engine.plan import Drawn, PictureSlice, Plan, Row, ShouldYield, StepResult, StepYielded, never
from omnilmm.engine.sampling import Bounds, draw_tokens
from omnilmm.errors import ConfigError, OmniError
from omnilmm.models.adapters import AdapterPool, TokenRun
from omnilmm.models.attention import Attend
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.device import pin_threads
from omnilmm.models.native_decode import NativeDecoder, can_decode

_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """Computes plans with a model, and owns its KV pool.

    It remembers nothing of any sequence but the keys and values in the pool's slots, so a plan is all it needs.

    Args:
        backend: how to attend; if not given, what the settings and the device ask for.
        adapters: where the rows of a plan that have an adapter find it.
        owns_cores: the first step pins the thread that takes it, and its helpers, to a core each.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        *,
        backend: Backend | None = None,
        adapters: AdapterPool | None = None,
        owns_cores: bool = False,
    ) -> None:
        if config.max_context > model.config.max_context:
            raise ConfigError(f"max_context is {config.max_context}, but the model has {model.config.max_context}")
        parameter = next(model.parameters())
        self._model = model
        self._device, self._dtype = parameter.device, parameter.dtype
        backend = backend or pick_backend(config, model.config, self._device)
        self._attend_factory = backend.attend
        self._adapters = adapters
        self._is_to_pin = owns_cores
        self._bounds = Bounds()
        self._kv = backend.pool(config, model.config, dtype=self._dtype, device=self._device)
        self._graphs = backend.prepare(model, self._kv, config)
        self._native: NativeDecoder | None = None
        if model.kernels is not None and can_decode(model, self._kv.pool):
            self._native = NativeDecoder(model, model.kernels, self._kv.pool, adapters)

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @torch.inference_mode()
    def run(self, plan: Plan, should_yield: ShouldYield = never) -> StepResult:
        """Compute a plan's rows and draw where one ends its sequence.

        A row with unfit picture vectors is left out, and one whose numbers come out not finite is not drawn from:
        both are in the result's failures, and the other rows are as they would be without them.

        Raises:
            StepYielded: `should_yield`, which is asked before every layer, said so. Not where a step is one launch.
        """
        if self._is_to_pin:
            self._is_to_pin = False
            pin_threads()
        vectors, failures = self._read_pictures(plan)
        rows = [row for row in plan.rows if row.sequence_id not in failures]
        if not rows:
            return StepResult(failures=failures)
        batch, hidden, logits = self._compute(rows, vectors, should_yield)
        is_fit = _is_finite(hidden)
        is_fit[batch.drawing.to(is_fit.device)] &= _is_finite(logits)
        for row, fit in zip(batch.rows, is_fit.tolist(), strict=True):
            if not fit:
                failures[row.sequence_id] = OmniError("the model produced a number that is not finite")
        return StepResult(self._draw(batch, logits, failures), failures)

    def _read_pictures(self, plan: Plan) -> tuple[dict[int, list[Tensor]], dict[int, OmniError]]:
        """Vectors of each row's pictures by sequence, or what is wrong with them."""
        vectors: dict[int, list[Tensor]] = {}
        failures: dict[int, OmniError] = {}
        for row in plan.rows:
            try:
                vectors[row.sequence_id] = [self._read_vectors(picture) for picture in row.pictures]
            except OmniError as error:
                failures[row.sequence_id] = error
        return vectors, failures

    def _read_vectors(self, picture: PictureSlice) -> Tensor:
        """(picture.count, hidden) in the model's dtype. The embedding came from another process: nothing is assumed."""
        embedding = picture.embedding
        shape = (picture.length, self._model.config.hidden)
        dtype = _DTYPES.get(embedding.dtype)
        if dtype is None:
            raise OmniError("an embedding has a number type we do not know")
        if embedding.shape != shape or len(embedding.data) != shape[0] * shape[1] * dtype.itemsize:
            raise OmniError("an embedding has another shape than its place in the prompt")
        vectors = torch.frombuffer(bytearray(embedding.data), dtype=dtype).view(shape)
        if not vectors.isfinite().all():
            raise OmniError("an embedding has a number that is not finite")
        wanted = vectors[picture.first : picture.first + picture.count]
        return wanted.to(self._device, self._dtype)

    def _compute(
        self, rows: Sequence[Row], vectors: Mapping[int, Sequence[Tensor]], should_yield: ShouldYield
    ) -> tuple[Batch, Tensor, Tensor]:
        """The rows as a batch, their hidden states (num_rows, hidden), and logits (num_drawing, vocab) float32."""
        size = self._kv.block_size
        if self._graphs is not None and self._graphs.can_run(rows):
            batch = build_batch(rows, block_size=size, device=torch.device("cpu"))  # its tensors stay here
            return batch, *self._graphs.run(batch)
        batch = build_batch(rows, block_size=size, device=self._device)
        hidden = self._forward(batch, vectors, should_yield)
        return batch, hidden, self._model.logits(hidden[batch.drawing])

    def _forward(self, batch: Batch, vectors: Mapping[int, Sequence[Tensor]], should_yield: ShouldYield) -> Tensor:
        """Hidden state of each row's last token, (num_rows, hidden); keys and values of all tokens go to the pool."""
        embeds = self._model.embed(batch.ids)  # (T, hidden)
        for row, first in zip(batch.rows, batch.firsts, strict=True):
            for picture, rows in zip(row.pictures, vectors[row.sequence_id], strict=True):
                begin = first + picture.offset
                embeds[begin : begin + picture.count] = rows
        if self._native is not None:
            return self._run_native(self._native, embeds, batch, should_yield)
        attend = _yielding(self._attend_factory(batch, self._kv), should_yield)
        with self._acting(batch):
            return self._model(embeds, batch.positions, attend)[batch.lasts]

    def _run_native(self, native: NativeDecoder, embeds: Tensor, batch: Batch, should_yield: ShouldYield) -> Tensor:
        """`_forward` by our own kernels."""
        if len(batch.begun):
            self._kv.begin(batch.begun)
        rows = batch.rows
        block_ids = np.zeros((len(rows), max(len(row.block_ids) for row in rows)), dtype=np.int32)
        for line, row in zip(block_ids, rows, strict=True):
            line[: len(row.block_ids)] = row.block_ids
        sequences = np.repeat(np.arange(len(rows), dtype=np.int32), [row.num_tokens for row in rows])
        ends = batch.positions.numpy().astype(np.int32) + 1
        ranks = None
        if any(row.ranks is not None for row in rows):
            pairs = [(0, 0) if row.ranks is None else (row.ranks.start, len(row.ranks)) for row in rows]
            ranks = np.array(pairs, dtype=np.int32)[sequences]
        before_layer = None if should_yield is never else partial(_give_way, should_yield)
        hidden = native.decode(
            embeds, batch.positions, block_ids, ends, sequences=sequences, before_layer=before_layer, ranks=ranks
        )
        return hidden[batch.lasts]

    def _acting(self, batch: Batch) -> AbstractContextManager[None]:
        """The adapters of a step's rows at work; nothing at all where there are none."""
        if all(row.ranks is None for row in batch.rows):
            return nullcontext()
        assert self._adapters is not None, "rows with an adapter, and no pool to find it in"
        runs = zip(batch.rows, batch.firsts, strict=True)
        return self._adapters.acting([TokenRun(first, first + row.num_tokens, row.ranks) for row, first in runs])

    def _draw(self, batch: Batch, logits: Tensor, failures: Mapping[int, OmniError]) -> dict[int, Drawn]:
        """Draw for the rows that end their sequence and did not fail."""
        drawing = [row for row in batch.rows if row.draw is not None]
        fit = [index for index, row in enumerate(drawing) if row.sequence_id not in failures]
        if len(fit) < len(drawing):
            drawing, logits = [drawing[index] for index in fit], logits[fit]
        if not drawing:
            return {}
        drawn = draw_tokens(logits, [row.draw for row in drawing if row.draw is not None], self._bounds)
        return {row.sequence_id: token for row, token in zip(drawing, drawn, strict=True)}


def _yielding(attend: Attend, should_yield: ShouldYield) -> Attend:
    """`attend`, which asks first whether it is still wanted."""
    if should_yield is never:
        return attend

    def attend_if_wanted(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _give_way(should_yield)
        return attend(layer, q, k, v)

    return attend_if_wanted


def _give_way(should_yield: ShouldYield) -> None:
    if should_yield():
        raise StepYielded


def _is_finite(rows: Tensor) -> Tensor:
    """(N,) bool for rows (N, width). A sum is finite only if all its terms are, and is read in one pass."""
    return rows.float().sum(dim=-1).isfinite()
