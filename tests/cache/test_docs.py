"""docs/cache.md names a test for every fault; here it is made sure that they exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "cache.md").read_text(encoding="utf-8")


def test_every_fault_of_redis_has_tests_and_they_exist() -> None:
    rows = {
        row.split()[1]: re.findall(r"`(test_\w+)`", row) for row in TEXT.splitlines() if re.match(r"\| F\d\d ", row)
    }
    assert sorted(rows) == [f"F{number}" for number in range(10, 18)]
    assert all(rows.values())
    sources = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    for row, names in rows.items():
        for name in names:
            assert f"def {name}(" in sources, f"{row} names {name}"
        own = [name for name in names if name.startswith(f"test_{row.lower()}_")]
        assert own, f"{row} has no test of its own name"


def test_every_file_it_names_exists() -> None:
    for path in re.findall(r"tests/[\w/]+\.py", TEXT):
        assert (TESTS.parent / path).exists(), path


def test_the_rights_it_asks_for_are_those_the_code_needs() -> None:
    from omnilmm.cache import redis

    (said,) = re.findall(r"ACL SETUSER[^`]+", TEXT)
    assert said.split() == re.search(r"ACL SETUSER [^\n]+\n[^\n]+", redis.__doc__ or "").group().split()
