"""Copies of tensors side by side in memory of our own."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from omnilmm.models.huge_pages import ALIGNMENT, CHUNK_BYTES, HugePages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_copies_are_equal_contiguous_aligned_and_apart() -> None:
    memory = HugePages()
    dtypes = 3 * [torch.bfloat16, torch.int8, torch.float32]
    originals = [torch.randn(size, 7).to(dtype).t() for size, dtype in enumerate(dtypes)]
    copies = [memory.copy(x) for x in originals]
    for x, own in zip(originals, copies, strict=True):
        assert own.dtype == x.dtype
        assert own.is_contiguous()
        assert own.data_ptr() % ALIGNMENT == 0
    for own in copies[::2]:
        own.add_(1)
    for index, (x, own) in enumerate(zip(originals, copies, strict=True)):
        assert torch.equal(own, x if index % 2 else x + 1), "whoever is written to, nobody else changes"


def test_what_is_larger_than_a_chunk_has_its_own() -> None:
    memory = HugePages()
    small, large = torch.arange(10), torch.arange(CHUNK_BYTES + 1, dtype=torch.int64).to(torch.uint8)
    copies = [memory.copy(small), memory.copy(large), memory.copy(small)]
    assert torch.equal(copies[0], small)
    assert torch.equal(copies[1], large)
    assert torch.equal(copies[2], small)


def test_a_copy_outlives_its_memory() -> None:
    copy = HugePages().copy(torch.arange(1000))
    gc.collect()
    assert torch.equal(copy, torch.arange(1000))


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="Linux gives no huge pages here")
def test_it_lies_on_huge_pages() -> None:
    def huge_kb() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])

    before = huge_kb()
    copy = HugePages().copy(torch.ones(CHUNK_BYTES // 2, dtype=torch.uint8))
    assert huge_kb() - before >= copy.nbytes // 1024 - 2 * 2048
