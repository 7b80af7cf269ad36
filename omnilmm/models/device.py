"""Where the weights live and how many CPU threads work on them: process-wide choices, made once at start."""

from __future__ import annotations

import os

import torch

from omnilmm.errors import ConfigError


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
