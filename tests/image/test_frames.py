"""The frames between pool and child, and what the parent refuses to believe."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilmm.config import ImagePolicy
from omnilmm.errors import ImageError
from omnilmm.image import frames
from omnilmm.messages import PixelIdentity, PreparedImage

IDENTITY = PixelIdentity(bytes(range(32)), 3, 2)
SIZES = frozenset({(3, 2), (2, 3)})


def through(fields: dict[str, object], payload_bytes: int = 0) -> dict[str, object]:
    data = frames.pack(fields, payload_bytes)
    fields_bytes, told = frames.unpack_head(data[: frames.HEAD_BYTES])
    assert told == payload_bytes
    assert len(data) == frames.HEAD_BYTES + fields_bytes
    return frames.unpack_fields(data[frames.HEAD_BYTES :])


def test_requests_go_through(original: ImagePolicy) -> None:
    assert frames.policy_of(through(frames.request_fields(original), 20_000_000)) == original


def test_answers_go_through() -> None:
    fields = through(frames.answer_fields(IDENTITY), 12)
    assert frames.refusal_of(fields) is None
    square = bytes(12)
    assert frames.picture_of(fields, square, side=2, sizes=SIZES) == PreparedImage(IDENTITY, 2, square)


def test_refusals_go_through() -> None:
    fields = through(frames.refusal_fields(ImageError("Bad — schlecht.", code="image_parse_error")))
    assert frames.refusal_of(fields) == ("image_parse_error", "Bad — schlecht.")


@pytest.mark.parametrize(
    "head",
    [
        bytes(frames.HEAD_BYTES),
        struct.pack("<4sIQ", b"OLI2", 2, 0),
        struct.pack("<4sIQ", b"OLI1", 2**32 - 1, 0),
    ],
)
def test_heads_that_are_none(head: bytes) -> None:
    with pytest.raises(frames.BadFrame):
        frames.unpack_head(head)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"3", b"null"])
def test_fields_that_are_none(text: bytes) -> None:
    with pytest.raises(frames.BadFrame):
        frames.unpack_fields(text)


@pytest.mark.parametrize(
    "fields",
    [{"code": "made_up", "message": "x"}, {"code": "image_parse_error"}, {"code": "image_parse_error", "message": 3}],
)
def test_refusals_that_are_none(fields: dict[str, object]) -> None:
    with pytest.raises(frames.BadFrame):
        frames.refusal_of(fields)


@pytest.mark.parametrize(
    ("change", "square_bytes"),
    [
        ({"digest": "00" * 31}, 12),
        ({"digest": "zz" * 32}, 12),
        ({"digest": 5}, 12),
        ({"width": 4}, 12),
        ({"width": "3"}, 12),
        ({"width": [3]}, 12),
        ({"height": None}, 12),
        ({}, 11),
        ({}, 0),
    ],
)
def test_answers_that_are_none(change: dict[str, object], square_bytes: int) -> None:
    fields = {**frames.answer_fields(IDENTITY), **change}
    with pytest.raises(frames.BadFrame):
        frames.picture_of(fields, bytes(square_bytes), side=2, sizes=SIZES)


def test_an_empty_answer() -> None:
    with pytest.raises(frames.BadFrame):
        frames.picture_of({}, bytes(12), side=2, sizes=SIZES)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3))


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.sampled_from(["code", "message", "digest", "width", "height"]), JSON))
def test_any_fields_are_an_answer_a_refusal_or_bad(fields: dict[str, object]) -> None:
    fields = json.loads(json.dumps(fields))
    try:
        if frames.refusal_of(fields) is None:
            frames.picture_of(fields, bytes(12), side=2, sizes=SIZES)
    except frames.BadFrame:
        pass
