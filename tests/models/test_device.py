"""Threads and the cores they run on."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from omnilmm.models.device import apart, pin_threads, use_threads

CORES = len(os.sched_getaffinity(0))


def in_a_new_thread(num_threads: int) -> tuple[bool, set[int], list[set[int]]]:
    """Whether it pinned its threads, its own cores, and those of the threads it made."""

    def work() -> tuple[bool, set[int], list[set[int]]]:
        torch.set_num_threads(num_threads)
        before = set(os.listdir("/proc/self/task"))
        pinned = pin_threads()
        made = set(os.listdir("/proc/self/task")) - before
        return pinned, os.sched_getaffinity(0), [os.sched_getaffinity(int(thread_id)) for thread_id in made]

    usual = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(work).result()
        finally:
            torch.set_num_threads(usual)


@pytest.mark.skipif(CORES < 2, reason="there is one core only")
def test_every_thread_gets_a_core_of_its_own() -> None:
    pinned, own, helpers = in_a_new_thread(CORES)
    assert pinned
    assert [len(cores) for cores in (own, *helpers)] == [1] * CORES
    assert own.union(*helpers) == os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(0)) == CORES  # other threads go where they like


def test_fewer_threads_than_cores_stay_free() -> None:
    pinned, own, _ = in_a_new_thread(CORES + 1)
    assert not pinned
    assert own == os.sched_getaffinity(0)


def test_no_number_of_threads_means_every_core() -> None:
    usual = torch.get_num_threads()
    try:
        assert use_threads(0) == torch.get_num_threads() == CORES
        assert use_threads(1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(usual)


@pytest.mark.skipif(CORES < 2, reason="there is one core only")
def test_what_is_computed_apart_leaves_no_helpers() -> None:
    """In a process of its own, because every test before this one may have left some."""
    script = """
import os, time, torch
from omnilmm.models.device import apart
torch.set_num_threads(2)
def count():
    return len(os.listdir("/proc/self/task"))
def compute():
    torch.ones(1 << 20).add_(1.0)
    return count()
before = count()
during = apart(compute)
ends_at = time.monotonic() + 60
while count() > before and time.monotonic() < ends_at:  # they are told to end, and need a moment for it
    time.sleep(0.01)
print(during - before, count() - before)
compute()
print(count() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["2", "0", "1"]


def test_an_error_comes_out_of_it() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
