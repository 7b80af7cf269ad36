from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine_fakes import make_model
from hypothesis import settings

from omnilmm.models.decoder import LanguageModel

settings.register_profile("thorough", max_examples=2000, deadline=None)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return make_model()


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Matrices this small are only slowed down by more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
