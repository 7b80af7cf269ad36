"""Where the weights live and how many CPU threads work on them: process-wide choices, made once at start."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from omnilmm.errors import ConfigError

ResultT = TypeVar("ResultT")


def pick_device(name: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu"; "cuda" without a device is a ConfigError."""
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise ConfigError("device cuda was asked for, but torch sees none")
    return name


def use_threads(num_threads: int) -> int:
    """Let torch use this many CPU threads in this process; 0 means every core we may run on. Returns the number.

    Ray sets OMP_NUM_THREADS from an actor's num_cpus, which would leave a replica that books a tenth of a core
    with a single thread.
    """
    chosen = num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(chosen)
    return chosen


def apart(work: Callable[[], ResultT]) -> ResultT:
    """Do work that computes (loading, filling a pool with zeros) in a thread that ends with it, and wait for that.

    Every thread that has ever computed in parallel keeps OpenMP helpers of its own. As soon as a process has more of
    all of these than cores, GNU's OpenMP lets a helper that waits sleep at once instead of spin for a moment, and a
    decode step, which is hundreds of short parallel loops, takes twice as long. So one thread computes (the engine's,
    or the encoder's), and whatever else has to be computed is done here.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="apart") as pool:
        return pool.submit(work).result()


def pin_threads() -> bool:
    """Give the calling thread and those that compute for it a core each, if they are as many as our cores. Linux only.

    Torch's threads meet after every operation, and spin for a moment until the last one comes. A scheduler that puts
    two of them on one core because somebody else is busy on the other makes each such meeting tens of times longer.
    To be called in the thread that computes, before its first operation: its helpers are made by that.

    Returns:
        Whether they are pinned now.
    """
    tasks = Path("/proc/self/task")
    cores = sorted(os.sched_getaffinity(0)) if tasks.is_dir() else []
    if len(cores) < 2 or torch.get_num_threads() != len(cores):
        return False
    before = {task.name for task in tasks.iterdir()}
    torch.ones(1 << 20).add_(1.0)  # large enough for all of them
    helpers = sorted({task.name for task in tasks.iterdir()} - before)
    if len(helpers) != len(cores) - 1:
        return False
    for core, thread_id in zip(cores, (0, *map(int, helpers)), strict=True):  # 0 is the calling thread
        os.sched_setaffinity(thread_id, {core})
    return True
