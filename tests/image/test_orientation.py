"""EXIF blocks, whole and broken: row I09."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import TURNS, exif_block, photo

from omnilmm.image.orientation import read_orientation, upright


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int, order: str, prefix: bytes) -> None:
    assert read_orientation(prefix + exif_block(orientation, order)) == orientation


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHIHH", tag, kind, count, value, 0)


def block(*entries: bytes, count: int | None = None, start: int = 8) -> bytes:
    return b"II*\0" + struct.pack("<IH", start, len(entries) if count is None else count) + b"".join(entries)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II",
        b"II*\0",
        b"MM*\0" + bytes(30),
        b"II*\0\xff\xff\xff\xff",
        block(),
        block(count=65_535),
        block(entry(0x0112, 3, 1, 0)),
        block(entry(0x0112, 3, 1, 9)),
        block(entry(0x0112, 2, 1, 6)),  # text
        block(entry(0x0112, 4, 1, 6)),  # a long
        block(entry(0x0112, 3, 2, 6)),  # two values
        block(entry(0x0112, 3, 1, 6), start=0),  # the directory is the header itself
        block(*[entry(0x8769, 4, 1, 8)] * 3),  # directories that point at themselves
        block(entry(0x0112, 3, 1, 6))[:-3],
        exif_block(6)[:12],
        b"Exif\0\0Exif\0\0" + exif_block(6),
    ],
)
def test_broken_blocks_mean_upright(exif: bytes) -> None:
    assert read_orientation(exif) == 1


def test_a_huge_block_is_left_quickly() -> None:
    huge = block(*[entry(0x0001, 7, 60_000, 8)] * 65_535) + bytes(20_000_000)
    before = time.process_time()
    assert read_orientation(huge) == 1
    assert time.process_time() - before < 0.1


def test_the_tag_may_come_late() -> None:
    assert read_orientation(block(*[entry(0x0100, 3, 1, 7)] * 500, entry(0x0112, 3, 1, 8))) == 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning(orientation: int) -> None:
    picture = photo(5, 3)
    turned = upright(picture, orientation)
    assert np.array_equal(np.asarray(turned), TURNS[orientation](np.asarray(picture)))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_give_some_orientation(data: bytes, big: bool) -> None:
    assert 1 <= read_orientation((b"MM\0*" if big else b"II*\0") + data) <= 8
