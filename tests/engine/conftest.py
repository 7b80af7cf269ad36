from __future__ import annotations

import pytest
from engine_fakes import make_model
from hypothesis import settings

from omnilmm.models.decoder import LanguageModel

settings.register_profile("thorough", max_examples=2000, deadline=None)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return make_model()
