"""Memory for weights on pages of 2 MB, where Linux gives them to who asks.

On pages of 4 KB a step that reads a quarter of a gigabyte needs 65,000 addresses translated, and no reading ahead goes
beyond a page by itself.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""What is asked for at a time. Pages nobody has written to take no memory."""

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""


class HugePages:
    """Keeps copies of tensors side by side, for as long as one of a chunk is in use."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def copy(self, x: Tensor) -> Tensor:
        """x (CPU, any strides), contiguous and aligned to `ALIGNMENT`."""
        if not x.nbytes:
            return x.clone()
        size = -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._rest):
            self._rest = _zeros(max(size, CHUNK_BYTES))
        own, self._rest = self._rest[: x.nbytes], self._rest[size:]
        return own.view(x.dtype).view(x.shape).copy_(x)


def _zeros(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps it alive
