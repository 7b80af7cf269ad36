"""API keys: 256 random bits, kept as SHA-256 digests only, looked up by digest and nothing else.

Without any key the server is open, but to this machine alone: only peers on the loopback interface are served.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from omnilmm.errors import ConfigError, NotFound, Unauthorized

KEY_PREFIX = "sk-omni-"
_MAX_KEY_CHARS = 256


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer. `scope` separates its cache entries; `models` None means every model."""

    name: str
    scope: str
    models: frozenset[str] | None = None
    weight: float = 1.0

    def check_model(self, model: str, served: Iterable[str]) -> None:
        """Raises NotFound, worded the same whether the model does not exist or is not this tenant's."""
        if model not in served or (self.models is not None and model not in self.models):
            raise NotFound(
                "The model does not exist or you do not have access to it.", param="model", code="model_not_found"
            )


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """`digest` is the lower-case hex SHA-256 of the key."""

    digest: str
    tenant: Tenant


def new_key() -> tuple[str, str]:
    """A fresh key and its digest. The key is shown once and never stored."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, digest_of(key)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyBook:
    """Finds the tenant behind a request.

    Raises ConfigError on a digest that is not 64 hex digits or appears twice.
    """

    def __init__(self, records: Iterable[KeyRecord] = ()) -> None:
        self._tenants: dict[str, Tenant] = {}
        for record in records:
            digest = record.digest.lower()
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ConfigError(f"the key digest of tenant {record.tenant.name!r} is not a SHA-256 in hex")
            if digest in self._tenants:
                raise ConfigError(f"the key of tenant {record.tenant.name!r} appears twice")
            self._tenants[digest] = record.tenant

    @property
    def is_open(self) -> bool:
        """True if there are no keys: everybody on this machine is the default tenant."""
        return not self._tenants

    def authenticate(self, authorization: list[str], peer: str | None) -> Tenant:
        """The tenant of a request with these Authorization headers from this socket address.

        Raises:
            Unauthorized: no key, a malformed one, one we do not know, or an open server asked from elsewhere.
        """
        if self.is_open:
            if not is_loopback(peer):
                raise Unauthorized("This server has no API keys and therefore answers its own machine only.")
            return Tenant(name="default", scope="default")
        if len(authorization) != 1:
            raise Unauthorized("Give exactly one Authorization header: Bearer YOUR_KEY.")
        scheme, _, key = authorization[0].partition(" ")
        if scheme.lower() != "bearer" or not key or len(key) > _MAX_KEY_CHARS or not key.isascii():
            raise Unauthorized("Incorrect API key provided.")
        # looked up by digest: how long that takes says nothing about the key itself
        tenant = self._tenants.get(digest_of(key))
        if tenant is None:
            raise Unauthorized("Incorrect API key provided.")
        return tenant


def is_loopback(address: str | None) -> bool:
    """True for 127.0.0.0/8 and ::1, also when an IPv4 address is written as IPv6."""
    if not address:
        return False
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
