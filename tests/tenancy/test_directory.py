"""Tenants and keys on disk: who may use what, from when until when, and that a server hears of it."""

from __future__ import annotations

import json

import pytest

from omnilmm.database import Database
from omnilmm.errors import InvalidRequest, NotFound, Unauthorized
from omnilmm.messages import Priority
from omnilmm.tenancy.directory import DAY_S, MAX_KEYS_PER_TENANT, Directory
from omnilmm.tenancy.keys import KeyBook, KeyRecord, Tenant, digest_of, new_key
from omnilmm.tenancy.tenant import TenantLimits


@pytest.fixture
def directory(database, clock):
    return Directory(database, wall=clock)


@pytest.fixture
def enter(directory, clock):
    """What a server that has just looked says of a key."""

    def enter(key, *fixed):
        book = KeyBook(fixed, wall=clock, clock=clock)
        book.learn(directory.roster())
        return book.authenticate([f"Bearer {key}"], "203.0.113.1")

    return enter


def test_a_tenant_is_as_it_was_made(directory, enter):
    changes = {"weight": 2, "priority": "batch", "models": ["b", "a"], "tokens_per_min": 5, "concurrent_requests": 7}
    directory.add("acme", changes)
    new = directory.add_key("acme", models=["a"])
    tenant = enter(new.secret)
    assert tenant == Tenant(
        "acme",
        "acme",
        frozenset("a"),
        2.0,
        Priority.BATCH,
        TenantLimits(tokens_per_min=5, concurrent_requests=7),
        new.info.id,
    )


def test_what_is_written_survives_the_process(directory, database_url, clock):
    directory.add("acme", {"requests_per_min": 3})
    directory.add_key("acme")
    other = Database(database_url)
    assert Directory(other, wall=clock).roster() == directory.roster()
    other.close()


def test_a_key_is_nowhere_on_disk(directory, tmp_path):
    directory.add("acme", {})
    new = directory.add_key("acme")
    held = b"".join(path.read_bytes() for path in (tmp_path / "records").iterdir())
    assert digest_of(new.secret).encode() in held
    assert new.secret.encode() not in held
    assert new.secret.removeprefix("sk-omni-").encode() not in held


def test_tenants_of_one_share_meet_and_nobody_else(directory):
    for name, share in (("a", None), ("b", "x"), ("c", "x"), ("x", None)):
        directory.add(name, {"share": share})
    scopes = {name: tenant.scope for name, tenant in directory.roster().tenants.items()}
    assert scopes["b"] == scopes["c"]
    assert len(set(scopes.values())) == 3


def test_every_change_moves_the_version(directory, enter):
    seen = [directory.version()]

    def moved():
        seen.append(directory.version())
        return seen[-1] > seen[-2]

    directory.add("acme", {})
    assert moved()
    first = directory.add_key("acme")
    assert moved()
    directory.change("acme", {"weight": 3})
    assert moved()
    second = directory.rotate_key("acme", first.info.id)
    assert moved()
    directory.revoke_key("acme", second.info.id)
    assert moved()
    directory.revoke("acme")
    assert moved()
    assert directory.roster().version == seen[-1]
    for refused in (lambda: directory.add("acme", {}), lambda: directory.change("nobody", {})):
        with pytest.raises((InvalidRequest, NotFound)):
            refused()
        assert not moved()


def test_keys_end_when_revoked_expired_or_their_tenant_is_gone(directory, enter, clock):
    directory.add("acme", {})
    revoked, expiring, last = (directory.add_key("acme", lasts_s=lasts) for lasts in (None, 100, None))
    directory.revoke_key("acme", revoked.info.id)
    with pytest.raises(Unauthorized):
        enter(revoked.secret)
    clock.now += 99
    enter(expiring.secret)
    clock.now += 1
    with pytest.raises(Unauthorized):
        enter(expiring.secret)
    enter(last.secret)
    directory.revoke("acme")
    with pytest.raises(Unauthorized):
        enter(last.secret)
    with pytest.raises(NotFound):
        directory.revoke("acme")
    with pytest.raises(InvalidRequest, match="is or was"):
        directory.add("acme", {})  # its pictures may still lie in the cache
    assert [(profile.name, is_live) for profile, is_live in directory.tenants()] == [("acme", False)]


def test_rotation_leaves_the_old_key_its_grace(directory, enter, clock):
    directory.add("acme", {"models": ["a", "b"]})
    old = directory.add_key("acme", models=["a"], lasts_s=30 * DAY_S)
    clock.now += DAY_S
    new = directory.rotate_key("acme", old.info.id, grace_s=60)
    assert new.info.models == ("a",)
    assert new.info.expires_at == clock.now + 30 * DAY_S
    enter(old.secret)
    clock.now += 60
    with pytest.raises(Unauthorized):
        enter(old.secret)
    assert enter(new.secret).models == frozenset("a")
    with pytest.raises(NotFound):
        directory.rotate_key("acme", old.info.id)


def test_rotation_never_lengthens_the_old_key(directory, clock):
    directory.add("acme", {})
    old = directory.add_key("acme", lasts_s=10)
    directory.rotate_key("acme", old.info.id, grace_s=1000)
    assert directory.keys("acme")[0].expires_at == clock.now + 10
    assert not directory.keys("acme")[0].is_live(clock.now + 10)


@pytest.mark.parametrize("name", ["", "a b", "../x", "*", "a" * 65, "+x", "ü", None, 7, "a\n"])
def test_names_are_plain(directory, name):
    with pytest.raises(InvalidRequest):
        directory.add(name, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "other"},
        {"name": "other"},
        {"share": "*"},
        {"weight": 0},
        {"weight": float("nan")},
        {"weight": True},
        {"weight": "2"},
        {"weight": 10**6},
        {"priority": "highest"},
        {"models": "a"},
        {"models": ["*"]},
        {"models": ["a"] * 300},
        {"models": [1]},
        {"tokens_per_min": 0},
        {"tokens_per_min": -1},
        {"tokens_per_min": 1.5},
        {"tokens_per_min": True},
        {"tokens_per_min": 2**60},
    ],
)
def test_what_may_be_said_of_a_tenant(directory, changes):
    directory.add("acme", {})
    for refused in (lambda: directory.add("other", changes), lambda: directory.change("acme", changes)):
        with pytest.raises(InvalidRequest) as caught:
            refused()
        assert caught.value.param == next(iter(changes))
    assert [profile.name for profile, _ in directory.tenants()] == ["acme"]


def test_limits_can_be_taken_away_again(directory):
    directory.add("acme", {"tokens_per_min": 5, "share": "x", "models": ["a"]})
    changed = directory.change("acme", {"tokens_per_min": None, "share": None, "models": None})
    assert directory.tenant("acme") == (changed, True)
    assert changed.limits == TenantLimits()
    assert json.dumps(changed.document())


def test_a_key_is_never_wider_than_its_tenant(directory, enter):
    directory.add("acme", {"models": ["a", "b"]})
    with pytest.raises(InvalidRequest):
        directory.add_key("acme", models=["a", "c"])
    new = directory.add_key("acme", models=["a", "b"])
    directory.change("acme", {"models": ["b", "c"]})
    assert enter(new.secret).models == frozenset("b")


@pytest.mark.parametrize("lasts_s", [0, -1, 1e12, float("nan"), "1", True])
def test_lifetimes_are_sane(directory, lasts_s):
    directory.add("acme", {})
    with pytest.raises(InvalidRequest):
        directory.add_key("acme", lasts_s=lasts_s)


def test_keys_of_a_tenant_are_bounded(directory):
    directory.add("acme", {})
    first = directory.add_key("acme")
    for _ in range(MAX_KEYS_PER_TENANT - 1):
        directory.add_key("acme")
    with pytest.raises(InvalidRequest, match="live keys"):
        directory.add_key("acme")
    directory.revoke_key("acme", first.info.id)
    directory.add_key("acme")


def test_a_key_of_another_tenant_looks_like_none(directory):
    directory.add("acme", {})
    directory.add("other", {})
    key = directory.add_key("acme").info.id
    with pytest.raises(NotFound) as foreign:
        directory.revoke_key("other", key)
    with pytest.raises(NotFound) as missing:
        directory.revoke_key("other", "0" * 16)
    assert foreign.value.body() == missing.value.body()


# -- beside the keys of the configuration -------------------------------------------------------------


def test_the_directory_rules_over_tenants_it_knows(directory, enter):
    key, digest = new_key()
    fixed = KeyRecord(digest, Tenant("acme", "acme", frozenset({"a", "b"})))
    assert enter(key, fixed).limits == TenantLimits()
    directory.add("acme", {"models": ["b", "c"], "tokens_per_min": 9})
    seen = enter(key, fixed)
    assert (seen.models, seen.limits.tokens_per_min) == (frozenset("b"), 9)
    directory.revoke("acme")
    with pytest.raises(Unauthorized):
        enter(key, fixed)


def test_revoking_the_last_key_does_not_open_the_server(directory, clock):
    book = KeyBook(wall=clock)
    book.learn(directory.roster())
    assert book.is_open
    directory.add("acme", {})
    book.learn(directory.roster())
    assert book.is_open
    new = directory.add_key("acme")
    book.learn(directory.roster())
    assert not book.is_open
    directory.revoke_key("acme", new.info.id)
    book.learn(directory.roster())
    assert not book.is_open
    with pytest.raises(Unauthorized):
        book.authenticate([], "127.0.0.1")


def test_lists_of_models_name_adapters_too(directory, enter):
    directory.add("acme", {"models": ["base:*", "other", "other:x"]})
    for wide in (["base"], ["base:*", "base"], ["other:*"], ["other:y"]):
        with pytest.raises(InvalidRequest, match="may not use"):
            directory.add_key("acme", models=wide)
    narrow = enter(directory.add_key("acme", models=["base:a", "other"]).secret)
    assert [narrow.may_use(name) for name in ("base:a", "other", "base", "base:b", "other:x")] == [1, 1, 0, 0, 0]
    whole = enter(directory.add_key("acme").secret)
    assert [whole.may_use(name) for name in ("base:a", "base:b", "other:x", "base", "other:y")] == [1, 1, 1, 0, 0]
    directory.change("acme", {"models": ["base:b", "other"]})  # what the tenant lost, its keys lost
    assert enter(narrow_key := directory.add_key("acme", models=["other"]).secret).may_use("other"), narrow_key


@pytest.mark.parametrize("models", [["*"], ["base*"], ["base:"], [":a"], ["base:a:b"], ["base:a*"], ["base:**"]])
def test_there_is_no_other_wildcard(directory, models):
    with pytest.raises(InvalidRequest) as refused:
        directory.add("acme", {"models": models})
    assert refused.value.param == "models"
