"""Which URLs are taken, and where passwords come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import AuthenticationError

from omnilmm.cache.address import MAX_CONNECTIONS, PasswordFile, make_pool
from omnilmm.errors import ConfigError


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:6379",
        "127.0.0.1:6379",
        "redis://127.0.0.1:notaport",
        "redis://127.0.0.1?no_such_option=1",
        "redis://127.0.0.1?socket_timeout=soon",
        "unix://",
        "redis://10.0.0.7:6379",
        "redis://redis.example:6379",
        "rediss://redis.example:6379",
        "redis+sentinel://127.0.0.1:26379",
        "redis+sentinel:///service",
        "redis+sentinel://127.0.0.1:notaport/service",
        "redis+sentinel://127.0.0.1:1,,127.0.0.1:2/service",
        "redis+sentinel://127.0.0.1/service?no_such_option=1",
        "redis+sentinel://127.0.0.1/service/notadatabase",
        "redis+sentinel://127.0.0.1,10.0.0.7/service",
        "rediss+sentinel://redis.example/service",
    ],
)
def test_a_url_that_cannot_be_used_or_trusted_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_pool(url, timeout_s=1.0)
    assert "redis_url" in caught.value.message
    assert "example" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://127.0.0.1:7000/2",
        "redis://[::1]:7000",
        "redis://:word@redis.example:6379",
        "rediss://user:word@redis.example:6379/0",
        "unix:///run/redis.sock?db=1",
        "redis+sentinel://localhost/service",
        "redis+sentinel://[::1]:7000,127.0.0.1:7001/service/3",
        "redis+sentinel://user:word@one.example,two.example:7000/service",
        "rediss+sentinel://:word@one.example/service",
    ],
)
def test_a_url_on_this_machine_or_with_a_password_is_taken(url: str) -> None:
    make_pool(url, timeout_s=1.0)


def test_sentinels_are_read_from_the_url() -> None:
    pool = make_pool("rediss+sentinel://user:w%40rd@[::1]:7000,two.example/cache/3?ssl_ca_certs=x", timeout_s=0.04)
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.service_name == "cache"
    kwargs = pool.connection_kwargs
    assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("user", "w@rd", 3)
    assert issubclass(pool.connection_class, SSLConnection)
    asked = [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
    assert [(p.connection_kwargs["host"], p.connection_kwargs["port"]) for p in asked] == [
        ("::1", 7000),
        ("two.example", 26379),
    ]
    assert all(p.connection_kwargs["socket_timeout"] == 0.01 for p in asked)
    assert all(issubclass(p.connection_class, SSLConnection) for p in asked)
    assert all(p.connection_kwargs.get("password") is None for p in asked)


@pytest.mark.parametrize("url", ["redis://127.0.0.1", "redis+sentinel://127.0.0.1/s"])
def test_the_bounds_are_ours_whatever_the_url_says(url: str) -> None:
    pool = make_pool(f"{url}?socket_connect_timeout=60&max_connections=999&retry_on_timeout=yes", timeout_s=0.05)
    assert pool.max_connections == MAX_CONNECTIONS
    assert pool.connection_kwargs["socket_connect_timeout"] == 0.05
    assert pool.connection_kwargs["retry_on_timeout"] is False


def test_the_password_is_read_each_time(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("first\n")
    pool = make_pool("redis://user@redis.example", timeout_s=1.0, password_file=path)
    provider = pool.connection_kwargs["credential_provider"]
    assert provider.get_credentials() == ("user", "first")
    path.write_text("second")
    assert provider.get_credentials() == ("user", "second")
    path.unlink()
    with pytest.raises(AuthenticationError) as caught:
        provider.get_credentials()
    assert str(tmp_path) not in str(caught.value)
    path.write_text("alone")
    assert PasswordFile(path, None).get_credentials() == ("alone",)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_file_without_a_password_is_refused_at_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="redis_password_file"):
        make_pool("redis://127.0.0.1", timeout_s=1.0, password_file=path)


def test_two_passwords_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("word")
    with pytest.raises(ConfigError, match="redis_password_file"):
        make_pool("redis://:other@127.0.0.1", timeout_s=1.0, password_file=path)
