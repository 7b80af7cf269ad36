"""Models small enough to be trained in a test, and conversations for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omnilmm.config import Family
from omnilmm.models.config import read_model_config
from omnilmm.prompt.template import Template, load_template
from omnilmm.training import nano
from omnilmm.training.learner import Learner, load_learner
from omnilmm.training.scenes_draw import Scenery
from omnilmm.training.sequences import SequenceMaker

FAMILIES = (Family.OMNILMM_12B, Family.OMNILMM_3B)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices as small as these gain nothing from a second thread, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pico_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    """Nano, only smaller: one checkpoint of each family."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        tower = {"SIDE": 32, "PATCH": 8, "VISION_WIDTH": 32, "VISION_BLOCKS": 2, "VISION_MLP": 48}
        language = {"HIDDEN": 128, "LAYERS": 2, "MLP": 96, "HEADS": 2, "CORPUS_SCENES": 400}
        for name, value in {**tower, **language}.items():
            patch.setattr(nano, name, value)
        for family in FAMILIES:
            folders[family] = tmp_path_factory.mktemp("pico") / family.value
            nano.write_nano(folders[family], family)
    return folders


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def folder(family: Family, pico_folders: dict[Family, Path]) -> Path:
    return pico_folders[family]


@pytest.fixture
def template(family: Family, folder: Path) -> Template:
    return load_template(family, folder)


@pytest.fixture
def maker(family: Family, template: Template) -> SequenceMaker:
    return SequenceMaker(family, template)


@pytest.fixture
def learner_of(folder: Path) -> Callable[..., Learner]:
    """A learner with everything learning, in float32; keywords as in `load_learner`."""

    def load(**settings: Any) -> Learner:
        torch.manual_seed(0)
        settings.setdefault("learn", ("vision", "resampler", "llm", "embeddings"))
        return load_learner(folder, read_model_config(folder), **settings)

    return load


@pytest.fixture(scope="session")
def bare_scenery() -> Scenery:
    """What every machine has."""
    return Scenery()
