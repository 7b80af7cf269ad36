"""Row K02 with a stopwatch: how long a wrong key takes says nothing about how near it is to a right one.

What is compared is the share of pairs (one of each kind, measured in turn) in which the first kind was quicker: 0.5 if
time tells nothing. A comparison letter by letter, measured the same way, shows that the stopwatch can see such things.
"""

from __future__ import annotations

import gc
import os
import secrets
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import suppress

import pytest

from omnilmm.errors import Unauthorized
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, new_key

NUM_PAIRS = 3000
KEYS = [new_key() for _ in range(50)]
BOOK = KeyBook([KeyRecord(digest, Tenant("acme", "acme")) for _, digest in KEYS])
STRANGERS = [new_key()[0] for _ in range(NUM_PAIRS)]
NEAR = [key[:-1] + ("A" if key[-1] != "A" else "B") for key, _ in secrets.SystemRandom().choices(KEYS, k=NUM_PAIRS)]
"""All but the last letter of a key we know."""

pytestmark = pytest.mark.skipif(
    "OMNILMM_TIMING" not in os.environ, reason="times depend on a quiet machine: OMNILMM_TIMING=1 asks for them"
)


def auc(check: Callable[[str], object]) -> float:
    """The chance that a stranger's key is refused sooner than one that is nearly right; ties count half."""
    times: tuple[list[int], list[int]] = ([], [])
    gc.disable()
    try:
        for number in range(2 * NUM_PAIRS):
            which = (number + number // 2) % 2  # 0 1 1 0: neither kind is always the one after the other
            key = (STRANGERS, NEAR)[which][len(times[which])]
            begun = time.perf_counter_ns()
            check(key)
            times[which].append(time.perf_counter_ns() - begun)
    finally:
        gc.enable()
    slow = sorted(times[1])
    wins = sum(2 * len(slow) - bisect_left(slow, x) - bisect_right(slow, x) for x in times[0])
    return wins / (2 * NUM_PAIRS**2)


def refuse(key: str) -> None:
    with suppress(Unauthorized):
        BOOK.authenticate([f"Bearer {key}"], "203.0.113.9")


def test_all_wrong_keys_take_the_same_time():
    scores = [auc(refuse) for _ in range(3)]
    assert min(abs(score - 0.5) for score in scores) < 0.05, scores


def test_the_stopwatch_sees_a_comparison_letter_by_letter():
    def compare(key: str) -> bool:
        return any(all(a == b for a, b in zip(key, known, strict=True)) for known, _ in KEYS)

    assert auc(compare) > 0.7
