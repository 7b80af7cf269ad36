from __future__ import annotations

import numpy as np
import pytest

from omnilmm.engine.philox import philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123 (kat_vectors, philox4x32-10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected


def test_uniform_is_a_function_of_seed_and_position():
    assert uniform(7, 3) == uniform(7, 3)
    numbers = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(numbers) == 900


def test_seeds_of_any_size_count():
    assert uniform(1, 0) != uniform(1 + 2**32, 0)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert uniform(5, 1) != uniform(5, 1 + 2**32)


def test_uniform_fills_the_interval_evenly():
    numbers = np.array([uniform(11, position) for position in range(20_000)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # the 0.1 % point of 19 degrees of freedom
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
