"""Files have names that say what they hold, and every folder of code is a package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sources import house, report

NO_NAMES = {"util", "utils", "helper", "helpers", "misc", "common", "stuff"}


def check_name(path: str) -> list[str]:
    """A file or folder whose name would fit anything."""
    return [path] if NO_NAMES & {*path.removesuffix(".py").split("/")} else []


def check_packages(paths: set[str]) -> list[str]:
    """Folders of Python files without `__init__.py`: packaging would silently leave them out."""
    folders = {path.rpartition("/")[0] for path in paths}
    return sorted(folder for folder in folders if f"{folder}/__init__.py" not in paths)


def test_names_say_what_is_inside() -> None:
    broken = [line for source in house() for line in check_name(source.path)]
    assert not broken, report(broken)


def test_every_folder_of_code_is_a_package() -> None:
    assert check_packages({source.path for source in house()}) == []


def check_test_names(paths: list[str]) -> list[str]:
    """Names that two modules under tests/ share: pytest imports them by their bare name, and stops at the second."""
    count = Counter(path.rpartition("/")[2] for path in paths)
    return sorted(name for name, times in count.items() if times > 1 and name != "conftest.py")


def test_test_modules_have_names_of_their_own() -> None:
    tests = Path(__file__).parents[1]
    assert check_test_names([path.relative_to(tests).as_posix() for path in tests.rglob("*.py")]) == []


def test_two_test_modules_of_one_name_are_found() -> None:
    assert check_test_names(["e2e/test_a.py", "image/test_a.py", "e2e/conftest.py", "conftest.py"]) == ["test_a.py"]


@pytest.mark.parametrize("path", ["omnilmm/utils.py", "omnilmm/engine/helpers.py", "deployments/common/ids.py"])
def test_a_name_for_anything_is_found(path: str) -> None:
    assert check_name(path) == [path]


def test_a_folder_that_is_no_package_is_found() -> None:
    assert check_packages({"omnilmm/__init__.py", "omnilmm/image/source.py"}) == ["omnilmm/image"]
    assert check_packages({"omnilmm/__init__.py", "omnilmm/flow.py"}) == []
