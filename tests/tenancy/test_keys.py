"""Keys: who gets in, who does not, and that an open server is open to its own machine only."""

import pytest

from omnilmm.errors import ConfigError, NotFound, Unauthorized
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, digest_of, is_loopback, new_key

KEY, DIGEST = new_key()
ACME = Tenant("acme", "scope-of-acme", models=frozenset({"omnilmm-3b"}))
BOOK = KeyBook([KeyRecord(DIGEST, ACME)])


def test_a_key_has_256_random_bits_and_its_digest_is_all_we_keep():
    other, _ = new_key()
    assert other != KEY
    assert len(KEY) >= 43
    assert digest_of(KEY) == DIGEST
    assert KEY not in repr(vars(BOOK))


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}"])
def test_the_right_key_opens(header):
    assert BOOK.authenticate([header], "203.0.113.9") is ACME


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["Bearer"],
        ["Bearer "],
        [f"Basic {KEY}"],
        [f"Bearer {KEY} "],
        [f"Bearer  {KEY}"],
        [f"Bearer {KEY[:-1]}"],
        [f"Bearer {DIGEST}"],
        ["Bearer *"],
        ["Bearer " + "x" * 1_000_000],
        ["Bearer schlüssel"],
        [f"Bearer {KEY}", f"Bearer {KEY}"],
    ],
)
def test_anything_else_does_not(headers):
    with pytest.raises(Unauthorized):
        BOOK.authenticate(headers, "127.0.0.1")


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_an_open_server_serves_its_own_machine(peer):
    assert KeyBook().authenticate([], peer).name == "default"


@pytest.mark.parametrize("peer", [None, "", "10.0.0.1", "203.0.113.9", "localhost", "::ffff:10.0.0.1", "0.0.0.0"])
def test_an_open_server_serves_nobody_else(peer):
    assert not is_loopback(peer)
    with pytest.raises(Unauthorized):
        KeyBook().authenticate([], peer)


def test_a_foreign_model_looks_like_a_missing_one():
    served = ["omnilmm-3b", "omnilmm-12b"]
    ACME.check_model("omnilmm-3b", served)
    with pytest.raises(NotFound) as foreign:
        ACME.check_model("omnilmm-12b", served)
    with pytest.raises(NotFound) as missing:
        ACME.check_model("no-such-model", served)
    assert foreign.value.body() == missing.value.body()


@pytest.mark.parametrize("digests", [["abc"], ["g" * 64], [DIGEST, DIGEST.upper()]])
def test_a_bad_book_is_refused(digests):
    with pytest.raises(ConfigError):
        KeyBook([KeyRecord(digest, ACME) for digest in digests])
