"""How fast this machine moves memory, and how much of it one decode step has to read."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import torch

from omnilmm.models.config import read_model_config
from omnilmm.models.weights import empty_language_model, torch_dtype

COPY_BYTES = 256 * 1024**2


def copy_bandwidth(repeats: int = 5) -> float:
    """Bytes per second, read and written together, of a copy far larger than the caches, on torch's threads."""
    source, target = torch.ones(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    rates = []
    for _ in range(repeats):
        begun = time.perf_counter()
        target.copy_(source)
        rates.append(2 * COPY_BYTES / (time.perf_counter() - begun))
    return statistics.median(rates)


def weight_bytes_per_step(folder: Path, dtype: str) -> int:
    """Bytes of weights that a decode step reads whatever the batch: all but an input embedding of its own.

    `dtype` is that of the weights, "int8" included.
    """
    config = read_model_config(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_language_model(config).named_parameters()}
    if not config.language.is_tied:
        del shapes["embedding.weight"]
    itemsize = 1 if dtype == "int8" else torch_dtype(dtype).itemsize
    return sum(math.prod(shape) for shape in shapes.values()) * itemsize
