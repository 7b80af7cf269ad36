from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilmm.cache.key import KeyRing
from omnilmm.errors import ConfigError
from omnilmm.messages import PixelIdentity

RING = KeyRing(b"0123456789abcdef")

words = st.text(max_size=12)
# Short fields over a tiny alphabet: the inputs most likely to meet when boundaries are lost.
tight = st.text(alphabet="a/\x00", max_size=3)
identities = st.builds(
    PixelIdentity, st.binary(min_size=32, max_size=32), st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1)
)


def fields(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "identity": identities,
            "scope": text,
            "family": text,
            "fingerprint": text,
            "preprocessing": text,
            "dtype": text,
        }
    )


@settings(deadline=None)
@given(fields(words))
def test_an_embedding_key_is_hex_under_its_kind_and_the_same_every_time(parts: dict) -> None:
    key = RING.embedding_key(**parts)
    assert re.fullmatch(r"emb:[0-9a-f]{64}", key)
    assert key == RING.embedding_key(**parts) == KeyRing(b"0123456789abcdef").embedding_key(**parts)


@settings(deadline=None)
@given(fields(tight), fields(tight))
def test_two_embedding_keys_meet_only_if_every_part_does(one: dict, other: dict) -> None:
    assert (RING.embedding_key(**one) == RING.embedding_key(**other)) == (one == other)


@settings(deadline=None)
@given(fields(words), st.data())
def test_each_part_alone_changes_the_key(parts: dict, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(parts)))
    changed = data.draw((identities if name == "identity" else words).filter(lambda value: value != parts[name]))
    assert RING.embedding_key(**parts) != RING.embedding_key(**{**parts, name: changed})


@settings(deadline=None)
@given(identities)
def test_the_size_is_part_of_the_picture(identity: PixelIdentity) -> None:
    turned = PixelIdentity(identity.digest, identity.height, identity.width)
    rest = {"scope": "s", "family": "f", "fingerprint": "w", "preprocessing": "p", "dtype": "d"}
    same = identity.width == identity.height
    assert (RING.embedding_key(identity, **rest) == RING.embedding_key(turned, **rest)) == same


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), tight, tight, tight, tight)
def test_two_aliases_meet_only_if_scope_and_decoding_do(digest: bytes, a: str, b: str, c: str, d: str) -> None:
    one, other = RING.alias_key(digest, scope=a, decoding=b), RING.alias_key(digest, scope=c, decoding=d)
    assert re.fullmatch(r"pix:[0-9a-f]{64}", one)
    assert (one == other) == ((a, b) == (c, d))


def test_an_alias_never_is_an_embedding_key() -> None:
    digest = bytes(32)
    alias = RING.alias_key(digest, scope="s", decoding="p")
    identity = PixelIdentity(digest, 1, 1)
    key = RING.embedding_key(identity, scope="s", family="", fingerprint="", preprocessing="p", dtype="")
    assert alias.partition(":")[2] != key.partition(":")[2]


def test_another_secret_gives_other_names() -> None:
    assert RING.alias_key(bytes(32), scope="s", decoding="p") != KeyRing(b"another secret!!").alias_key(
        bytes(32), scope="s", decoding="p"
    )


def test_a_lone_surrogate_still_has_a_name_of_its_own() -> None:
    assert RING.alias_key(bytes(32), scope="\ud800", decoding="") != RING.alias_key(
        bytes(32), scope="\ud801", decoding=""
    )


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="secret"):
        KeyRing(b"fifteen bytes..")
