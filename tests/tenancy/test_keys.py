"""Keys: who gets in, who does not, and that an open server is open to its own machine only."""

from dataclasses import replace

import pytest
from tenancy_fakes import HandClock

from omnilmm.errors import ConfigError, Forbidden, NotFound, Overloaded, Unauthorized
from omnilmm.tenancy.keys import (
    MAX_STALE_S,
    AdminKeys,
    KeyBook,
    KeyRecord,
    Roster,
    Tenant,
    digest_of,
    is_loopback,
    new_key,
)

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
    assert BOOK.authenticate([header], "203.0.113.9") == replace(ACME, key_id=DIGEST[:16])


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


def test_an_expired_key_is_an_unknown_one():
    clock = HandClock()
    book = KeyBook([KeyRecord(DIGEST, ACME, expires_at=1001.0)], wall=clock)
    book.authenticate([f"Bearer {KEY}"], None)
    clock.now = 1001.0
    with pytest.raises(Unauthorized) as expired:
        book.authenticate([f"Bearer {KEY}"], None)
    with pytest.raises(Unauthorized) as unknown:
        book.authenticate([f"Bearer {KEY}x"], None)
    assert expired.value.body() == unknown.value.body()
    assert not book.is_open


def test_a_key_can_only_narrow_its_tenant():
    book = KeyBook([KeyRecord(DIGEST, ACME, models=frozenset({"omnilmm-3b", "omnilmm-12b"}))])
    assert book.authenticate([f"Bearer {KEY}"], None).models == {"omnilmm-3b"}


def test_a_directory_out_of_reach_is_believed_for_a_while():
    clock = HandClock()
    fixed, digest = new_key()
    book = KeyBook([KeyRecord(digest, Tenant("fixed", "fixed"))], clock=clock, wall=clock)
    book.learn(Roster(1, (KeyRecord(DIGEST, ACME),), {"acme": ACME}, had_keys=True))
    clock.now += MAX_STALE_S
    book.confirm()
    clock.now += MAX_STALE_S
    book.authenticate([f"Bearer {KEY}"], None)
    clock.now += 1
    with pytest.raises(Overloaded):
        book.authenticate([f"Bearer {KEY}"], None)
    with pytest.raises(Unauthorized):
        book.authenticate(["Bearer wrong"], None)
    book.authenticate([f"Bearer {fixed}"], None)  # the configuration is always at hand
    book.confirm()
    book.authenticate([f"Bearer {KEY}"], None)


# -- the admin's keys ---------------------------------------------------------------------------------

ADMIN_KEY, ADMIN_DIGEST = new_key()


def test_an_admin_s_key_opens_what_a_tenant_s_does_not():
    admins = AdminKeys([ADMIN_DIGEST])
    admins.authenticate([f"Bearer {ADMIN_KEY}"], "127.0.0.1", BOOK)
    with pytest.raises(Forbidden, match="admin key"):
        admins.authenticate([f"Bearer {KEY}"], "127.0.0.1", BOOK)
    for header in ([], ["Bearer wrong"], [f"Bearer {ADMIN_DIGEST}"]):
        with pytest.raises(Unauthorized):
            admins.authenticate(header, "127.0.0.1", BOOK)
    with pytest.raises(Unauthorized):
        BOOK.authenticate([f"Bearer {ADMIN_KEY}"], "127.0.0.1")


@pytest.mark.parametrize(
    ("networks", "peer", "is_let_in"),
    [
        (None, "127.0.0.1", True),
        (None, "::1", True),
        (None, "::ffff:127.0.0.1", True),
        (None, "10.0.0.1", False),
        (None, None, False),
        (("10.0.0.0/8",), "10.1.2.3", True),
        (("10.0.0.0/8",), "11.1.2.3", False),
        (("10.0.0.0/8",), "127.0.0.1", False),
    ],
)
def test_an_admin_comes_from_where_admins_come_from(networks, peer, is_let_in):
    admins = AdminKeys([ADMIN_DIGEST]) if networks is None else AdminKeys([ADMIN_DIGEST], networks=networks)
    if is_let_in:
        admins.authenticate([f"Bearer {ADMIN_KEY}"], peer, BOOK)
    else:
        with pytest.raises(Forbidden, match="address"):
            admins.authenticate([f"Bearer {ADMIN_KEY}"], peer, BOOK)


def test_without_admin_keys_nobody_is_admin():
    for book in (KeyBook(), BOOK):
        with pytest.raises(Unauthorized):
            AdminKeys([]).authenticate([f"Bearer {ADMIN_KEY}"], "127.0.0.1", book)


def test_a_managed_server_is_closed_before_its_first_key():
    book = KeyBook(is_managed=True)
    assert not book.is_open
    with pytest.raises(Unauthorized):
        book.authenticate([], "127.0.0.1")


@pytest.mark.parametrize(("digests", "networks"), [(["abc"], ["::1"]), ([ADMIN_DIGEST], ["here"])])
def test_bad_admin_settings_are_refused(digests, networks):
    with pytest.raises(ConfigError):
        AdminKeys(digests, networks=networks)
