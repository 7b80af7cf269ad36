"""A computation of fixed shapes as a CUDA graph: launched as one piece instead of kernel by kernel.

A decode step of a 3B model is some six hundred kernels of a few microseconds each, and Python cannot launch them as
fast as a GPU finishes them. What a graph computes reads its inputs from, and leaves its outputs in, tensors that stay
where they are: the caller fills the ones, replays, and reads the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from omnilmm.errors import ConfigError

ResultT = TypeVar("ResultT")

NUM_REHEARSALS = 3
"""Runs before a capture, in which kernels are compiled and libraries take their workspaces."""


def pick_graphs(wanted: bool | None, device: torch.device, *, param: str) -> bool:
    """Whether to use CUDA graphs: None means where there are any.

    Raises:
        ConfigError: they are asked for on another device than CUDA.
    """
    if wanted and device.type != "cuda":
        raise ConfigError(f"{param} is made for CUDA, and the device is {device.type}", param=param)
    return device.type == "cuda" and wanted is not False


def bucket_of(size: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest of the rising `buckets` that holds `size`; None where the largest does not."""
    return next((bucket for bucket in buckets if size <= bucket), None)


def graph_memory() -> Any:
    """Memory for the inner tensors and results of several graphs."""
    return torch.cuda.graph_pool_handle()


class CapturedStep(Generic[ResultT]):
    """Calls of `compute` as replays of one recorded call. Gives the same tensors at every call, with new contents.

    Args:
        compute: launches the same kernels on the same addresses whenever it is called, and waits for none of them.
        memory: `graph_memory()`, shared with graphs that never run at the same time and whose results are read at once.
    """

    def __init__(self, compute: Callable[[], ResultT], *, memory: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_REHEARSALS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may allocate meanwhile (an adapter, a picture): only this one's calls are recorded.
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._result = compute()

    def __call__(self) -> ResultT:
        self._graph.replay()
        return self._result
