"""What needs a CUDA device: `pytest tests/gpu`. Skipped where torch sees none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from omnilmm.models.config import LanguageConfig
from omnilmm.models.decoder import LanguageModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["no group", "groups of 2", "groups of 3"])
def wide_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Small, but with heads that CUDA's kernels take; groups of 3 are not read by the kernel for decodes."""
    config = LanguageConfig(
        hidden=96,
        num_layers=2,
        num_heads=2 * request.param,
        num_kv_heads=2,
        head_dim=32,
        mlp_width=128,
        vocab_size=301,
        max_context=1024,
        norm_eps=1e-6,
        rope_theta=1e4,
    )
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                scale = 1.0 if name == "embedding.weight" else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.requires_grad_(False).eval()
