"""From the operator's words to a pool of connections: which server it is, how to sign in, and no bound but ours.

    redis://[user:password@]host[:port][/db]      rediss:// with TLS      unix:///path/of/socket
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db]      rediss+sentinel:// with TLS

With sentinels the hosts are theirs, and `service` is the name they watch the server under. They are asked for its
address at every new connection, so that after a failover the next one goes to the new server. They are asked without
a password; user and password are the server's own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisError
from redis.maint_notifications import MaintNotificationsConfig

from omnilmm.errors import ConfigError

MAX_CONNECTIONS: Final = 8  # more would only make each exchange slower: one loop reads them all

_READ_BYTES: Final = 1 << 18  # asyncio hands over at most this much at once; the default of 32 KiB costs 16 rounds
_SENTINEL_SCHEMES: Final[Mapping[str, str]] = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
_SENTINEL_PORT: Final = 26379
_SENTINEL_SHARE: Final = 4
"""A sentinel that hangs may take a quarter of the time of an exchange, so that two others can still be asked."""

Address = tuple[str, int]


class PasswordFile(CredentialProvider):
    """The password as it stands in a file whenever a connection is made: who changes it there need restart nothing.

    Connections that are open stay so; a server that throws them out, or is gone, is met with the new one.
    """

    def __init__(self, path: Path, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """(password,) or (username, password); the white space around the password is not part of it.

        Raises:
            AuthenticationError: the file is gone, empty, or not text.
        """
        try:
            password = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            password = ""
        if not password:
            raise AuthenticationError("the password file holds none")
        return (password,) if self._username is None else (self._username, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def make_pool(url: str, *, timeout_s: float, password_file: Path | None = None) -> ConnectionPool:
    """A pool whose timeouts and retries are ours, whatever the query string of the URL says. Connects nothing yet.

    Args:
        url: one of the forms above, options in its query as redis-py reads them.
        timeout_s: for making a connection.
        password_file: where the password stands, if not in the URL.

    Raises:
        ConfigError: the URL cannot be used, or names another machine without a password; the file holds none.
    """
    sentinels, service, plain = _split_sentinels(url)
    try:
        given = dict(parse_url(plain))
    except ValueError:
        raise ConfigError("redis_url: expected redis://, rediss:// or unix:// with valid options") from None
    if given.get("connection_class") is UnixDomainSocketConnection and not given.get("path"):
        raise ConfigError("redis_url: unix:// needs the path of a socket")
    _sign_in(given, password_file)
    if "path" not in given:
        _refuse_open_door(given, [host for host, _ in sentinels] or [str(given.get("host", "localhost"))])
    pool = _pool_of(given, sentinels, service, timeout_s)
    try:
        pool.make_connection()  # connects nothing; finds options the connection does not know
    except (TypeError, ValueError, RedisError):
        raise ConfigError("redis_url: unknown or contradictory options in its query") from None
    return pool


async def close_pool(pool: ConnectionPool) -> None:
    """Close every connection, those to sentinels too."""
    await pool.disconnect()
    if isinstance(pool, SentinelConnectionPool):
        await pool.sentinel_manager.aclose()


def _pool_of(given: Mapping[str, Any], sentinels: Sequence[Address], service: str, timeout_s: float) -> ConnectionPool:
    options = {**given, **_bounds(timeout_s)}
    if not sentinels:
        return ConnectionPool(**options)
    is_tls = options.pop("connection_class", None) is SSLConnection
    for own in ("host", "port"):  # they are found out
        options.pop(own, None)
    asked_s = timeout_s / _SENTINEL_SHARE
    asking = _bounds(timeout_s) | {"socket_timeout": asked_s, "socket_connect_timeout": asked_s, "ssl": is_tls}
    del asking["retry_on_timeout"]  # a client, unlike a connection, warns of its age
    return SentinelConnectionPool(service, Sentinel(sentinels, sentinel_kwargs=asking), ssl=is_tls, **options)


def _bounds(timeout_s: float) -> dict[str, Any]:
    return {
        "max_connections": MAX_CONNECTIONS,
        # The link's budget is the bound. redis-py's own would know nothing of a busy loop, and its bound on writes is
        # made with asyncio.wait_for, which in Python 3.11 can swallow a cancellation (cpython issue 86296): ours, or
        # a client's.
        "socket_timeout": None,
        "socket_connect_timeout": timeout_s,
        "socket_read_size": _READ_BYTES,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
        "health_check_interval": 0,
        "decode_responses": False,
        "protocol": 2,  # no HELLO: one round trip less before the first command
        "driver_info": None,  # no CLIENT SETINFO either
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _split_sentinels(url: str) -> tuple[list[Address], str, str]:
    """Sentinels, service and the rest as an ordinary URL; no sentinels and the URL itself for one of another kind."""
    scheme, _, _ = url.partition("://")
    if scheme not in _SENTINEL_SCHEMES:
        return [], "", url
    parts = urlsplit(url)
    sign_in, at, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    try:
        sentinels = [_address(host) for host in hosts.split(",")]
    except ValueError:
        sentinels = []
    if not sentinels or not service or (database and not database.isdecimal()):
        raise ConfigError("redis_url: expected redis+sentinel://host:port,host:port/service")
    return sentinels, service, f"{_SENTINEL_SCHEMES[scheme]}://{sign_in}{at}localhost/{database}?{parts.query}"


def _address(text: str) -> Address:
    """Host and port of "host", "host:port" or "[v6]:port".

    Raises:
        ValueError: no host, or the port is not a number of a port.
    """
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError
    return parts.hostname, parts.port or _SENTINEL_PORT


def _sign_in(given: dict[str, Any], password_file: Path | None) -> None:
    """Have the password read from `password_file`, if there is one."""
    if password_file is None:
        return
    if given.pop("password", None):
        raise ConfigError("redis_password_file: the URL has a password too; which one?")
    provider = PasswordFile(password_file, given.pop("username", None))
    try:
        provider.get_credentials()
    except AuthenticationError:
        raise ConfigError("redis_password_file: no password can be read from it") from None
    given["credential_provider"] = provider


def _refuse_open_door(given: Mapping[str, Any], hosts: Sequence[str]) -> None:
    """A Redis anyone on the network can write to is refused."""
    if given.get("password") or given.get("credential_provider"):
        return
    if not all(host == "localhost" or _is_loopback(host) for host in hosts):
        raise ConfigError("redis_url: a server on another machine needs a password")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
