from __future__ import annotations

import pytest
from hypothesis import settings

from omnilmm.config import ImageLimits, ImagePolicy, InputHandling

settings.register_profile("thorough", max_examples=2000, deadline=None)


@pytest.fixture
def limits() -> ImageLimits:
    return ImageLimits()


@pytest.fixture
def safe() -> ImagePolicy:
    return ImagePolicy(side=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def original(safe: ImagePolicy) -> ImagePolicy:
    return safe.resolve(handling=InputHandling.ORIGINAL)
