"""Imports run one way. The table below is the picture of the house in the README."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest
from sources import PACKAGES, Source, house, imports, report

# Inside omnilmm a room may import the lines above its own; in a blind line the rooms do not know one another.
PICTURE = (
    ("errors messages ports config observe database", ""),
    ("api image prompt cache models tenancy files", "blind"),
    ("encoder engine training batch", "blind"),
    ("card retries composing gathering flow pipeline", ""),
    ("chat", ""),
)
LEVEL = {room: level for level, (rooms, _) in enumerate(PICTURE) for room in rooms.split()}
BLIND = {room for rooms, kind in PICTURE if kind for room in rooms.split()}

# Training is made from the models and never seen by what serves: only the command line starts it.
TRAINING_SEEN_FROM = ("omnilmm/training/", "cluster/")


def room_of(dotted: str) -> str:
    """The room of a dotted name inside omnilmm; "" for the package itself."""
    room = dotted.split(".")[1] if "." in dotted else ""
    return "" if room.startswith("__") else room


def check_direction(source: Source) -> list[str]:
    """Imports of this file that run against the picture."""
    package = source.module.split(".")[0]
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    broken = []
    for name, node in imports(source):
        target = name.split(".")[0]
        if target in (*PACKAGES, "tests") and target not in allowed:
            broken.append(source.at(node, f"{package} imports {name}"))
        elif target == "omnilmm" == package and not may_see(room_of(source.module), room_of(name)):
            broken.append(source.at(node, f"{source.module} imports {name}"))
        if name.startswith("omnilmm.training") and not source.lives_in(TRAINING_SEEN_FROM):
            broken.append(source.at(node, "the serving side imports training"))
    return broken


def may_see(room: str, other: str) -> bool:
    """The package itself holds the version only: what it imported, every process of the cluster would load."""
    if room == other or not other:
        return True
    if room not in LEVEL or other not in LEVEL:
        return False
    return LEVEL[other] < LEVEL[room] or (LEVEL[other] == LEVEL[room] and other not in BLIND)


def find_cycle(sources: tuple[Source, ...]) -> list[str]:
    """Modules that import one another in a circle, [] if there are none."""
    modules = {source.module for source in sources}
    graph = {
        source.module: {home for name, _ in imports(source) if (home := _module_of(name, modules))} - {source.module}
        for source in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _module_of(name: str, modules: set[str]) -> str | None:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def test_the_house_is_there() -> None:
    paths = {source.path for source in house()}
    assert {"omnilmm/errors.py", "omnilmm/messages.py", "omnilmm/ports.py"} <= paths


def test_imports_run_one_way() -> None:
    broken = [line for source in house() for line in check_direction(source)]
    assert not broken, report(broken)


def test_no_modules_import_in_a_circle() -> None:
    assert find_cycle(house()) == []


def test_every_room_is_in_the_picture() -> None:
    rooms = {room_of(source.module) for source in house() if source.module.startswith("omnilmm")}
    assert rooms - LEVEL.keys() - {""} == set()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("omnilmm/errors.py", "from omnilmm.api import requests"),
        ("omnilmm/api/requests.py", "import omnilmm.prompt.tokens"),
        ("omnilmm/api/requests.py", "from omnilmm import image"),
        ("omnilmm/api/requests.py", "from ..cache import key"),
        ("omnilmm/image/source.py", "from importlib import import_module\nimport_module('omnilmm.cache.key')"),
        ("omnilmm/cache/key.py", "from omnilmm.engine.blocks import Block"),
        ("omnilmm/engine/loop.py", "def f():\n    from omnilmm.encoder.loop import EncoderLoop"),
        ("omnilmm/engine/loop.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import omnilmm.flow"),
        ("omnilmm/flow.py", "from omnilmm.chat import OmniLMMChat"),
        ("omnilmm/pipeline.py", "from omnilmm.training import loop"),
        ("omnilmm/__init__.py", "from omnilmm.chat import OmniLMMChat"),
        ("omnilmm/attic/old.py", "from omnilmm.errors import OmniError"),
        ("omnilmm/flow.py", "from deployments.handles import EncoderHandle"),
        ("omnilmm/flow.py", "from tests.fakes import FakeDecoder"),
        ("deployments/app.py", "import cluster.cli"),
        ("deployments/app.py", "from omnilmm.training.loop import tune"),
    ],
)
def test_imports_against_the_picture_are_found(path: str, text: str) -> None:
    assert len(check_direction(Source.parse(path, text))) >= 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("omnilmm/ports.py", "from omnilmm.messages import Span"),
        ("omnilmm/api/requests.py", "from omnilmm.errors import OmniError\nfrom omnilmm.api.sse import frame"),
        ("omnilmm/api/requests.py", "from . import sse\nfrom ..errors import OmniError"),
        ("omnilmm/engine/runner.py", "from omnilmm.models.decoder import Decoder"),
        ("omnilmm/training/loop.py", "from omnilmm.models.decoder import Decoder\nfrom omnilmm.training import data"),
        ("omnilmm/pipeline.py", "from omnilmm.flow import ChatFlow\nfrom omnilmm.engine.loop import EngineLoop"),
        ("deployments/app.py", "from omnilmm import __version__\nfrom deployments.router import Router"),
        ("cluster/cli.py", "from deployments.app import build\nfrom omnilmm.training.loop import tune"),
    ],
)
def test_imports_along_the_picture_pass(path: str, text: str) -> None:
    assert check_direction(Source.parse(path, text)) == []


def test_a_circle_is_found() -> None:
    texts = {
        "omnilmm/engine/a.py": "from omnilmm.engine import b",
        "omnilmm/engine/b.py": "from omnilmm.engine.c import x",
        "omnilmm/engine/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y",
    }
    assert find_cycle(tuple(Source.parse(*item) for item in texts.items()))
