"""The image encoder over batches that stay in place, so that a CUDA graph can replay each of a few sizes.

Pictures are all of one size, so a batch is padded with whole pictures: those that stood there before. A picture's
vectors depend on nothing else in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from omnilmm.models.capture import CapturedStep, bucket_of, graph_memory

ENCODE_SIZES = (1, 2, 4, 8, 16)
"""Pictures in a batch, padded to one of these."""

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of an encoding one that is quicker to call."""


class StaticEncode:
    """The encoder over `pixels` (size, 3, side, side), which are zeros until something is written there."""

    def __init__(self, model: nn.Module, *, size: int, side: int, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self.pixels = torch.zeros(size, 3, side, side, dtype=dtype, device=device)

    def compute(self) -> Tensor:
        """(size, num_query, hidden)."""
        vectors: Tensor = self._model(self.pixels)
        return vectors


class EncodeGraphs:
    """Encodings of all sizes up to the largest that is needed, ready to run.

    Args:
        record: captures an encoding; for tests, may hand it back as it is.
    """

    def __init__(self, model: nn.Module, *, max_batch: int, side: int, record: Recorder | None = None) -> None:
        example = next(model.parameters())
        needed = bucket_of(max_batch, ENCODE_SIZES) or ENCODE_SIZES[-1]
        self._sizes = tuple(size for size in ENCODE_SIZES if size <= needed)
        self._static = {
            size: StaticEncode(model, size=size, side=side, dtype=example.dtype, device=example.device)
            for size in self._sizes
        }
        if record is None:
            record = partial(CapturedStep, memory=graph_memory())
        with torch.inference_mode():  # the largest first: the others find room in its memory
            self._steps = {size: record(self._static[size].compute) for size in reversed(self._sizes)}

    def can_run(self, num_pictures: int) -> bool:
        return num_pictures <= self._sizes[-1]

    def run(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side), on any device and in any floating dtype -> (B, num_query, hidden) on the model's.

        What it returns is overwritten by the next run.
        """
        size = bucket_of(len(pixels), self._sizes)
        assert size is not None, "more pictures than the largest size"
        self._static[size].pixels[: len(pixels)].copy_(pixels)
        return self._steps[size]()[: len(pixels)]
