from __future__ import annotations

import hmac
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilmm.cache.codec import Codec
from omnilmm.cache.encoding import Encoding, min_cosine
from omnilmm.cache.key import derive
from omnilmm.errors import ConfigError
from omnilmm.messages import Embedding, Encoded, PixelIdentity

SECRET = b"0123456789abcdef"
CODEC = Codec(SECRET)
INT8, FP8 = Codec(SECRET, Encoding.INT8), Codec(SECRET, Encoding.FP8)
SMALL = Embedding("float32", (2, 3), bytes(range(24)))
WIDE = Embedding("float32", (4, 64), struct.pack("<256f", *(math.sin(i) for i in range(256))))
LOPSIDED = Embedding("float32", (1, 64), struct.pack("<64f", 1e6, *[1.0] * 63))  # int8 loses all but the first
IDENTITY = PixelIdentity(bytes(range(32)), 640, 480)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@st.composite
def embeddings(draw: st.DrawFn) -> Embedding:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    size = shape[0] * shape[1] * ITEM_BYTES[dtype]
    return Embedding(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


def opened(key: str, raw: bytes, codec: Codec = CODEC) -> Embedding | None:
    encoded = codec.decode(key, raw)
    return None if encoded is None else encoded.embedding


def sealed(key: str, header: bytes, body: bytes, secret: bytes = SECRET) -> bytes:
    """A value whose seal holds, whatever its header says."""
    name = key.encode()
    message = len(name).to_bytes(8, "little") + name + header + body
    return header + body + hmac.digest(derive(secret, b"omnilmm cache values"), message, "sha256")


@settings(deadline=None)
@given(embeddings(), st.text(alphabet="abcdef0123456789:"))
def test_what_was_stored_comes_back(embedding: Embedding, key: str) -> None:
    assert opened(key, CODEC.encode(key, embedding).raw) == embedding


@given(st.floats(0, 1e9))
def test_the_seconds_it_took_travel_along(seconds: float) -> None:
    encoded = CODEC.decode("k", CODEC.encode("k", SMALL, seconds=seconds).raw)
    assert encoded == Encoded(SMALL, stored=True, seconds=seconds)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_an_identity_comes_back(digest: bytes, width: int, height: int) -> None:
    identity = PixelIdentity(digest, width, height)
    assert CODEC.decode_identity("pix:1", CODEC.encode_identity("pix:1", identity)) == identity


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_nothing(raw: bytes) -> None:
    assert CODEC.decode("emb:1", raw) is None
    assert CODEC.decode_identity("pix:1", raw) is None


@settings(deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    for raw, decode in (
        (CODEC.encode("k", SMALL).raw, CODEC.decode),
        (INT8.encode("k", WIDE).raw, INT8.decode),
        (CODEC.encode_identity("k", IDENTITY), CODEC.decode_identity),
    ):
        position = data.draw(st.integers(0, len(raw) * 8 - 1))
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        assert decode("k", bytes(damaged)) is None


@pytest.mark.parametrize("cut", [0, 1, 23, 24, 55, -33, -32, -1])
def test_any_truncation_is_found(cut: int) -> None:
    raw = CODEC.encode("k", SMALL).raw
    assert CODEC.decode("k", raw[:cut]) is None
    assert CODEC.decode("k", raw + b"\x00") is None


def test_a_value_holds_only_under_its_own_name_secret_and_kind() -> None:
    raw = CODEC.encode("emb:1", SMALL).raw
    assert CODEC.decode("emb:2", raw) is None
    assert Codec(b"another secret!!").decode("emb:1", raw) is None
    assert CODEC.decode_identity("emb:1", raw) is None
    assert CODEC.decode("emb:1", CODEC.encode_identity("emb:1", IDENTITY)) is None


def header(
    magic: bytes = b"OLVE",
    version: int = 2,
    dtype: int = 1,
    encoding: int = 0,
    zero: int = 0,
    rows: int = 2,
    columns: int = 3,
    seconds: float = 0.0,
) -> bytes:
    return struct.pack("<4sBBBBIId", magic, version, dtype, encoding, zero, rows, columns, seconds)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},  # another format version
        {"version": 3},
        {"magic": b"XXXX"},
        {"dtype": 9},  # no such dtype
        {"dtype": 2},  # half the bytes would do
        {"encoding": 9},  # no such encoding
        {"encoding": 1},  # packed, where this codec takes exact numbers only
        {"zero": 1},  # reserved field in use
        {"rows": 3},  # more rows than data
        {"rows": 2**32 - 1, "columns": 2**32 - 1},
        {"seconds": -1.0},
        {"seconds": math.nan},
        {"seconds": math.inf},
    ],
)
def test_a_sealed_header_must_still_describe_the_data(changes: dict) -> None:
    assert opened("k", sealed("k", header(), SMALL.data)) == SMALL  # the helper seals as the codec does
    assert CODEC.decode("k", sealed("k", header(**changes), SMALL.data)) is None


def test_a_sealed_value_without_numbers_is_nothing() -> None:
    assert CODEC.decode("k", sealed("k", header(rows=0), b"")) is None


@pytest.mark.parametrize(
    "embedding",
    [Embedding("int4", (1, 1), b"1234"), Embedding("float32", (1, 2), b"1234"), Embedding("float32", (0, 2), b"")],
)
def test_a_record_that_contradicts_itself_is_not_stored(embedding: Embedding) -> None:
    with pytest.raises(ValueError, match="does not match"):
        CODEC.encode("k", embedding)


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf])
def test_seconds_that_would_make_a_value_unreadable_are_not_stored(seconds: float) -> None:
    with pytest.raises(ValueError, match="length of time"):
        CODEC.encode("k", SMALL, seconds=seconds)


def test_an_identity_needs_a_whole_digest() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        CODEC.encode_identity("k", PixelIdentity(b"short", 1, 1))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="secret"):
        Codec(b"short")


@pytest.mark.parametrize("codec", [INT8, FP8])
def test_a_packed_value_comes_back_nearly_and_in_its_own_dtype(codec: Codec) -> None:
    stored = codec.encode("k", WIDE, seconds=0.5)
    assert stored.encoding is codec.encoding
    assert len(stored.raw) < len(WIDE.data)
    encoded = codec.decode("k", stored.raw)
    assert encoded.seconds == 0.5
    assert (encoded.embedding.dtype, encoded.embedding.shape) == (WIDE.dtype, WIDE.shape)
    before, after = (np.frombuffer(e.data, "<f4").reshape(e.shape) for e in (WIDE, encoded.embedding))
    assert 0.999 < min_cosine(before, after) < 1.0


def test_whoever_wants_exact_numbers_takes_no_others() -> None:
    packed = INT8.encode("k", WIDE).raw
    assert CODEC.decode("k", packed) is None
    assert FP8.decode("k", packed) is None


def test_exact_numbers_are_good_for_everyone() -> None:
    raw = CODEC.encode("k", WIDE).raw
    assert opened("k", raw, INT8) == opened("k", raw, FP8) == WIDE


def test_vectors_that_do_not_fit_are_kept_exactly() -> None:
    stored = INT8.encode("k", LOPSIDED)
    assert stored.encoding is Encoding.EXACT
    assert opened("k", stored.raw, INT8) == LOPSIDED
