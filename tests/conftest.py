"""Where the test data lies."""

import os
from pathlib import Path

import pytest

from cluster.cli import PROCESS_ENVIRONMENT
from cluster.local import RAY_ENVIRONMENT
from deployments.settings import DATABASE_VARIABLE

# Read when torch and ray are loaded, which the first test to need them does.
os.environ.update(PROCESS_ENVIRONMENT | RAY_ENVIRONMENT)

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def _database_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test touches the database of whoever runs the tests."""
    os.environ[DATABASE_VARIABLE] = f"sqlite:///{tmp_path_factory.mktemp('records') / 'omnilmm.db'}"


@pytest.fixture(scope="session")
def data() -> Path:
    """Reference checkpoints with golden outputs, and pictures."""
    return DATA


@pytest.fixture(scope="session")
def picture_folder() -> Path | None:
    """A folder with every reference picture, the one we may not ship included; None on most machines."""
    folder = os.environ.get("OMNILMM_REFERENCE_IMAGES")
    return Path(folder) if folder else None
