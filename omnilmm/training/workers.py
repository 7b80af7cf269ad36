"""One worker or several: the seam at which training is spread. Every worker holds the whole model and sees rows of
its own; gradients and counts are added up. Whoever starts the workers makes the torch process group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, distributed

from omnilmm.errors import OmniError


class WorkerLost(OmniError):
    """Another worker failed. Why, it says itself."""


class Workers(Protocol):
    """This process among its like."""

    rank: int
    world: int

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor, in place, by its sum over all workers. Each must call it with the same shapes.

        Raises:
            WorkerLost: one of them has ended.
        """
        ...


class OneWorker:
    rank = 0
    world = 1

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        return None


class TorchWorkers:
    """The default process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        held = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in held])  # one message instead of hundreds
        try:
            distributed.all_reduce(flat)
        except RuntimeError as error:  # as gloo and NCCL tell it, with lines of their source
            raise WorkerLost("another worker has ended, or cannot be reached") from error
        for tensor, part in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
            tensor.copy_(part.view_as(tensor))


def current_workers() -> Workers:
    """The process group if there is one, else this process alone."""
    return TorchWorkers() if distributed.is_available() and distributed.is_initialized() else OneWorker()
