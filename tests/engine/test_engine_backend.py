"""What the settings ask for on which device, and what is refused. Nothing here needs the device to be there."""

from __future__ import annotations

import pytest
import torch
from engine_fakes import make_model

from omnilmm.config import EngineConfig
from omnilmm.engine.backend import pick_backend
from omnilmm.engine.batch import GatheredAttention
from omnilmm.engine.paged import PagedAttention
from omnilmm.engine.runner import ModelRunner
from omnilmm.errors import ConfigError
from omnilmm.models.config import LanguageConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDE = LanguageConfig(256, 2, 4, 2, 64, 64, 61, 4096, 1e-6, 1e4)
NARROW = LanguageConfig(32, 2, 4, 2, 8, 48, 61, 4096, 1e-6, 1e4)


@pytest.mark.parametrize(
    ("device", "model", "changes", "is_paged", "has_graphs"),
    [
        (CPU, WIDE, {}, False, False),
        (CPU, WIDE, {"attention": "gathered", "cuda_graphs": False}, False, False),
        (CUDA, WIDE, {}, True, True),
        (CUDA, WIDE, {"cuda_graphs": False}, True, False),
        (CUDA, WIDE, {"cuda_graphs": True}, True, True),
        (CUDA, WIDE, {"attention": "paged", "block_size": 128}, True, True),
        (CUDA, WIDE, {"attention": "gathered"}, False, False),
        (CUDA, WIDE, {"block_size": 24}, False, False),
        (CUDA, NARROW, {}, False, False),
    ],
)
def test_what_is_chosen(device, model, changes, is_paged, has_graphs):
    backend = pick_backend(EngineConfig(**changes), model, device)
    assert isinstance(backend.attend, PagedAttention) is is_paged
    assert isinstance(backend.attend, GatheredAttention) is not is_paged
    assert backend.has_graphs is has_graphs


@pytest.mark.parametrize(
    ("device", "model", "changes", "param"),
    [
        (CPU, WIDE, {"attention": "paged"}, "attention"),
        (CPU, WIDE, {"cuda_graphs": True}, "cuda_graphs"),
        (CUDA, WIDE, {"attention": "gathered", "cuda_graphs": True}, "cuda_graphs"),
        (CUDA, WIDE, {"attention": "paged", "block_size": 24}, "attention"),
        (CUDA, NARROW, {"attention": "paged"}, "attention"),
        (CUDA, WIDE, {"block_size": 8, "cuda_graphs": True}, "cuda_graphs"),
        (CUDA, WIDE, {"attention": "flash"}, "attention"),
    ],
)
def test_what_would_do_nothing_is_refused(device, model, changes, param):
    with pytest.raises(ConfigError, match=param):
        pick_backend(EngineConfig(**changes), model, device)


def test_a_runner_on_cpu_refuses_what_is_made_for_cuda():
    config = EngineConfig(num_blocks=16, max_context=128, attention="paged")
    with pytest.raises(ConfigError, match="made for CUDA"):
        ModelRunner(make_model(), config)
