"""API keys: 256 random bits, kept as SHA-256 digests only, looked up by digest and nothing else.

Without any key the server is open, but to this machine alone: only peers on the loopback interface are served. The
first key ever made closes it for good; revoking the last one does not open it again.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from omnilmm.errors import ConfigError, Forbidden, NotFound, Overloaded, Unauthorized
from omnilmm.tenancy.access import is_entry, narrowed
from omnilmm.tenancy.presence import Presence, Visit
from omnilmm.tenancy.tenant import Tenant

__all__ = ["AdminKeys", "KeyBook", "KeyRecord", "Roster", "Tenant", "digest_of", "is_loopback", "new_key"]

KEY_PREFIX: Final = "sk-omni-"
MAX_STALE_S: Final = 300.0
"""How long keys of a directory that cannot be reached are still believed."""
_MAX_KEY_CHARS: Final = 256
_KEY_ID_CHARS: Final = 16
_OPEN: Final = Tenant(name="default", scope="default")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as we remember it.

    `digest` is the lower-case hex SHA-256 of the key. `models` None means all the tenant may use; a list can only
    narrow that (see `tenancy.access`). `expires_at` is a Unix time in seconds.
    """

    digest: str
    tenant: Tenant
    id: str = ""
    models: frozenset[str] | None = None
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Roster:
    """All a directory knows at one moment: live keys, live tenants by name, and the names of revoked ones.

    `had_keys` says whether there ever was a key, even if none is left.
    """

    version: int = 0
    keys: tuple[KeyRecord, ...] = ()
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    had_keys: bool = False


def new_key() -> tuple[str, str]:
    """A fresh key and its digest. The key is shown once and never stored."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, digest_of(key)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Entry:
    tenant: Tenant
    expires_at: float | None
    from_directory: bool


class KeyBook:
    """Finds the tenant behind a request: keys of the configuration, and those of a directory that changes.

    A tenant that the directory knows is as the directory says, also behind a key of the configuration. Requests under
    way are its visits: they end when their key or their tenant is revoked.

    Args:
        records: the keys of the configuration.
        is_managed: there is an admin, so the server is closed even before the first key is made.
        wall: Unix time in seconds, for expiry.
        clock: monotonic seconds, for the age of what the directory said.

    Raises:
        ConfigError: a digest is not 64 hex digits, or appears twice; a list of models is none.
    """

    def __init__(
        self,
        records: Iterable[KeyRecord] = (),
        *,
        is_managed: bool = False,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = tuple(records)
        self._is_managed = is_managed
        self._wall = wall
        self._clock = clock
        self._seen_at = clock()
        self._entries: dict[str, _Entry] = {}
        self.presence: Final = Presence()
        for record in self._fixed:
            _check_models(record)
        self.learn(Roster())

    @property
    def is_open(self) -> bool:
        """True if there never was a key: everybody on this machine is the default tenant."""
        return not self._fixed and not self._is_managed and not self._roster.had_keys

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name as it is now, for work it left behind.

        Raises:
            NotFound: there is none, or it was revoked.
        """
        if self.is_open and name == _OPEN.name:
            return _OPEN
        known = dict(self._roster.tenants)
        for record in self._fixed:
            known.setdefault(record.tenant.name, record.tenant)
        if name not in known or name in self._roster.revoked:
            raise NotFound("There is no such tenant.")
        return known[name]

    def learn(self, roster: Roster) -> None:
        """Believe what the directory says now.

        Requests under way keep the tenant they came with, but those of revoked keys and tenants end. Call it on the
        event loop that answers them.
        """
        entries: dict[str, _Entry] = {}
        for record in roster.keys:
            entries[record.digest] = _entry(record, record.tenant, from_directory=True)
        own: set[str] = set()
        for record in self._fixed:
            digest = _checked_digest(record)
            if digest in own:
                raise ConfigError(f"the key of tenant {record.tenant.name!r} appears twice")
            own.add(digest)
            if record.tenant.name in roster.revoked:
                entries.pop(digest, None)
                continue
            tenant = roster.tenants.get(record.tenant.name)
            seen = record if tenant is None else replace(record, models=narrowed(record.models, record.tenant.models))
            entries[digest] = _entry(seen, tenant or record.tenant, from_directory=False)
        self._roster, self._entries, self._seen_at = roster, entries, self._clock()
        self._ids = frozenset(entry.tenant.key_id for entry in entries.values())
        self.presence.show_out(self.is_revoked)

    @property
    def revoked(self) -> frozenset[str]:
        """Names of tenants that were shut out for good."""
        return self._roster.revoked

    def is_revoked(self, tenant: Tenant) -> bool:
        """Whether a tenant as `authenticate` or `tenant` once gave it was revoked since, or the key it came with was.

        Keys that merely expired are not: what began with them may end.
        """
        return tenant.name in self._roster.revoked or (bool(tenant.key_id) and tenant.key_id not in self._ids)

    def visit(self, tenant: Tenant) -> Visit:
        """For a request of this tenant: whatever is done inside ends with Unauthorized when it is revoked.

        To enter it raises Unauthorized if it is revoked already.
        """
        visit = Visit(self.presence, tenant)
        if self.is_revoked(tenant):
            visit.end()
        return visit

    def confirm(self) -> None:
        """The directory was asked and has not changed."""
        self._seen_at = self._clock()

    def authenticate(self, authorization: list[str], peer: str | None) -> Tenant:
        """The tenant of a request with these Authorization headers from this socket address.

        Raises:
            Unauthorized: no key, a malformed one, one we do not know, an expired one, or an open server asked from
                elsewhere.
            Overloaded: `keys_unavailable`, a good key, but its directory has been out of reach for MAX_STALE_S.
        """
        if self.is_open:
            if not is_loopback(peer):
                raise Unauthorized("This server has no API keys and therefore answers its own machine only.")
            return _OPEN
        # looked up by digest: how long that takes says nothing about the key itself
        entry = self._entries.get(_digest_in(authorization))
        if entry is None or (entry.expires_at is not None and self._wall() >= entry.expires_at):
            raise Unauthorized("Incorrect API key provided.")
        if entry.from_directory and self._clock() - self._seen_at > MAX_STALE_S:
            raise Overloaded("API keys cannot be checked right now.", code="keys_unavailable", retry_after=5)
        return entry.tenant


class AdminKeys:
    """The keys of whoever runs the server. They open /admin and nothing else, and tenants' keys do not open it.

    Args:
        digests: hex SHA-256 of each key; none switches the admin API off.
        networks: addresses and networks an admin may come from, by the socket's peer.

    Raises:
        ConfigError: a digest or a network is malformed.
    """

    def __init__(self, digests: Iterable[str], *, networks: Iterable[str] = ("127.0.0.0/8", "::1/128")) -> None:
        nobody = Tenant(name="admin", scope="admin")
        self._digests = frozenset(_checked_digest(KeyRecord(digest, nobody)) for digest in digests)
        try:
            self._networks = tuple(ipaddress.ip_network(network) for network in networks)
        except ValueError:
            raise ConfigError("an admin network is not an address or a CIDR block") from None

    def authenticate(self, authorization: list[str], peer: str | None, tenants: KeyBook) -> None:
        """Let an admin pass.

        Raises:
            Unauthorized: no key or one nobody knows.
            Forbidden: a tenant's key, or an admin's from an address that is not allowed.
        """
        if _digest_in(authorization) not in self._digests:
            if tenants.is_open:
                raise Unauthorized("This server has no admin keys, so it cannot be administered over HTTP.")
            tenants.authenticate(authorization, peer)  # Unauthorized, unless it is a tenant's
            raise Forbidden("This needs an admin key.", code="admin_key_required")
        address = _address(peer)
        if address is None or not any(address in network for network in self._networks):
            raise Forbidden("The admin API is closed to this address.", code="admin_address_refused")


def is_loopback(address: str | None) -> bool:
    """True for 127.0.0.0/8 and ::1, also when an IPv4 address is written as IPv6."""
    parsed = _address(address)
    return parsed is not None and parsed.is_loopback


def _address(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text or "")
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _digest_in(authorization: list[str]) -> str:
    """The digest of the one bearer key in these headers. Raises Unauthorized where there is none."""
    if len(authorization) != 1:
        raise Unauthorized("Give exactly one Authorization header: Bearer YOUR_KEY.")
    scheme, _, key = authorization[0].partition(" ")
    if scheme.lower() != "bearer" or not key or len(key) > _MAX_KEY_CHARS or not key.isascii():
        raise Unauthorized("Incorrect API key provided.")
    return digest_of(key)


def _checked_digest(record: KeyRecord) -> str:
    digest = record.digest.lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ConfigError(f"the key digest of tenant {record.tenant.name!r} is not a SHA-256 in hex")
    return digest


def _entry(record: KeyRecord, tenant: Tenant, *, from_directory: bool) -> _Entry:
    seen = replace(
        tenant,
        models=narrowed(tenant.models, record.models),
        # a key of the configuration has no name; a piece of its digest gives nothing away
        key_id=record.id or record.digest.lower()[:_KEY_ID_CHARS],
    )
    return _Entry(seen, record.expires_at, from_directory)


def _check_models(record: KeyRecord) -> None:
    for entry in (*(record.models or ()), *(record.tenant.models or ())):
        if not is_entry(entry):
            raise ConfigError(f"a model of tenant {record.tenant.name!r} is neither MODEL, MODEL:ADAPTER nor MODEL:*")
