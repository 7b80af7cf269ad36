"""Where the test data lies."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; see cluster/cli.py

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """Reference checkpoints with golden outputs, and pictures."""
    return DATA


@pytest.fixture(scope="session")
def picture_folder() -> Path | None:
    """A folder with every reference picture, the one we may not ship included; None on most machines."""
    folder = os.environ.get("OMNILMM_REFERENCE_IMAGES")
    return Path(folder) if folder else None
