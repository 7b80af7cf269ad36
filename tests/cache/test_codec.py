from __future__ import annotations

import hmac
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilmm.cache.codec import Codec
from omnilmm.cache.key import derive
from omnilmm.errors import ConfigError
from omnilmm.messages import Embedding, PixelIdentity

SECRET = b"0123456789abcdef"
CODEC = Codec(SECRET)
SMALL = Embedding("float32", (2, 3), bytes(range(24)))
IDENTITY = PixelIdentity(bytes(range(32)), 640, 480)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@st.composite
def embeddings(draw: st.DrawFn) -> Embedding:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    size = shape[0] * shape[1] * ITEM_BYTES[dtype]
    return Embedding(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


def sealed(key: str, header: bytes, body: bytes, secret: bytes = SECRET) -> bytes:
    """A value whose seal holds, whatever its header says."""
    name = key.encode()
    message = len(name).to_bytes(8, "little") + name + header + body
    return header + body + hmac.digest(derive(secret, b"omnilmm cache values"), message, "sha256")


@settings(deadline=None)
@given(embeddings(), st.text(alphabet="abcdef0123456789:"))
def test_what_was_stored_comes_back(embedding: Embedding, key: str) -> None:
    assert CODEC.decode(key, CODEC.encode(key, embedding)) == embedding


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
        (CODEC.encode("k", SMALL), CODEC.decode),
        (CODEC.encode_identity("k", IDENTITY), CODEC.decode_identity),
    ):
        position = data.draw(st.integers(0, len(raw) * 8 - 1))
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        assert decode("k", bytes(damaged)) is None


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 47, -33, -32, -1])
def test_any_truncation_is_found(cut: int) -> None:
    raw = CODEC.encode("k", SMALL)
    assert CODEC.decode("k", raw[:cut]) is None
    assert CODEC.decode("k", raw + b"\x00") is None


def test_a_value_holds_only_under_its_own_name_secret_and_kind() -> None:
    raw = CODEC.encode("emb:1", SMALL)
    assert CODEC.decode("emb:2", raw) is None
    assert Codec(b"another secret!!").decode("emb:1", raw) is None
    assert CODEC.decode_identity("emb:1", raw) is None
    assert CODEC.decode("emb:1", CODEC.encode_identity("emb:1", IDENTITY)) is None


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<4sBBHII", b"OLVE", 2, 1, 0, 2, 3),  # another format version
        struct.pack("<4sBBHII", b"XXXX", 1, 1, 0, 2, 3),  # another magic
        struct.pack("<4sBBHII", b"OLVE", 1, 9, 0, 2, 3),  # no such dtype
        struct.pack("<4sBBHII", b"OLVE", 1, 2, 0, 2, 3),  # half the bytes would do
        struct.pack("<4sBBHII", b"OLVE", 1, 1, 1, 2, 3),  # reserved field in use
        struct.pack("<4sBBHII", b"OLVE", 1, 1, 0, 3, 3),  # more rows than data
        struct.pack("<4sBBHII", b"OLVE", 1, 1, 0, 2**32 - 1, 2**32 - 1),
    ],
)
def test_a_sealed_header_must_still_describe_the_data(header: bytes) -> None:
    good = struct.pack("<4sBBHII", b"OLVE", 1, 1, 0, 2, 3)
    assert CODEC.decode("k", sealed("k", good, SMALL.data)) == SMALL  # the helper seals as the codec does
    assert CODEC.decode("k", sealed("k", header, SMALL.data)) is None


def test_a_sealed_value_without_numbers_is_nothing() -> None:
    assert CODEC.decode("k", sealed("k", struct.pack("<4sBBHII", b"OLVE", 1, 1, 0, 0, 3), b"")) is None


@pytest.mark.parametrize(
    "embedding",
    [Embedding("int4", (1, 1), b"1234"), Embedding("float32", (1, 2), b"1234"), Embedding("float32", (0, 2), b"")],
)
def test_a_record_that_contradicts_itself_is_not_stored(embedding: Embedding) -> None:
    with pytest.raises(ValueError, match="does not match"):
        CODEC.encode("k", embedding)


def test_an_identity_needs_a_whole_digest() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        CODEC.encode_identity("k", PixelIdentity(b"short", 1, 1))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="secret"):
        Codec(b"short")
