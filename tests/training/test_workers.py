"""The seam over torch's process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed

from omnilmm.training.workers import OneWorker, TorchWorkers, WorkerLost, current_workers


def test_without_a_group_there_is_one_worker() -> None:
    assert isinstance(current_workers(), OneWorker)


def test_tensors_of_all_shapes_are_added_up_in_place(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        workers = current_workers()
        assert isinstance(workers, TorchWorkers)
        assert (workers.rank, workers.world) == (0, 1)
        first, second = torch.arange(6.0).view(2, 3), torch.tensor(5.0)
        workers.add_up([first, second])
        assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert second.item() == 5
    finally:
        distributed.destroy_process_group()


def test_a_worker_that_cannot_be_reached_is_told_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(tensor: torch.Tensor) -> None:
        raise RuntimeError("[pair.cc:553] Connection closed by peer")

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "all_reduce", hang_up)
        with pytest.raises(WorkerLost, match=r"^another worker has ended"):
            current_workers().add_up([torch.zeros(2)])
    finally:
        distributed.destroy_process_group()
