"""Which URLs we would fetch a picture from, and which addresses we would connect to: rules without any network.

A URL is read by one grammar, narrower than any parser's, so that no two readers can take it for different places:

    url    = ( "https" / "http" ) "://" host [ ":" port ] [ "/" path ] [ "?" query ]
    host   = labels of letters, digits and inner hyphens, 253 characters at most / dotted IPv4 / "[" IPv6 "]"
    path, query = ASCII of RFC 3986, with whole percent-encodings

No user or password, no fragment, no backslash, no white space, nothing that is not ASCII (international names are given
in their xn-- form), no dot at the end of a name, and no other spelling of an IPv4 address than four decimal numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

MAX_URL_CHARS = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_CHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})"
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    rf"(?P<path>(?:/{_CHAR}*)?(?:\?(?:{_CHAR}|\?)*)?)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_ENTRY = re.compile(r"(?P<host>\*|(?:\*\.)?[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?")

_PORTS: Mapping[str, int] = MappingProxyType({"https": 443, "http": 80})

# Globally routable by their registry, and yet ways into other networks or no places for servers.
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # Teredo, benchmarking, ORCHID
        "2001:db8::/32",
        "2002::/16",  # 6to4: carries an IPv4 address
        "3fff::/20",  # documentation
    )
)
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # leaves out NAT64 and every form with an IPv4 address inside


class BadAddress(ValueError):
    """Not a place to fetch from. The message is for the client and repeats nothing of the URL."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where one request goes. `host` is lower-case, IPv6 without brackets; `path` includes the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def literal(self) -> Address | None:
        """The address, where the host is one."""
        return _literal(self.host)

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> Target:
    """Read a URL by the grammar above.

    Raises:
        BadAddress: it is not one.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if match is None:
        raise BadAddress("The URL of the picture is malformed, or not a plain https URL.")
    scheme = match["scheme"].lower()
    port = int(match["port"] or _PORTS[scheme])
    host = _checked_host(match["host"].lower())
    if host is None or port > 65_535:
        raise BadAddress("The URL of the picture has no valid host and port.")
    path = match["path"]
    return Target(scheme, host, port, path if path.startswith("/") else f"/{path}")


@dataclass(frozen=True, slots=True)
class AllowList:
    """The operator's hosts.

    An entry is a name, ``*.name`` for the names below it, or ``*`` for every public name with a dot in it; with
    ``:port`` it allows that port, without it the ports 80 and 443. `internal` entries are whole names or addresses;
    they alone may lead to addresses that are not public.

    Raises:
        ValueError: an entry is none of these.
    """

    hosts: tuple[str, ...] = ()
    internal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in (*self.hosts, *self.internal):
            match = _ENTRY.fullmatch(entry)
            is_name = match is not None and (match["host"] == "*" or _checked_host(match["host"].removeprefix("*.")))
            if not is_name or ("*" in entry and entry in self.internal):
                raise ValueError(f"{entry!r} is not a host, *.host, or host:port in lower case")

    def is_internal(self, target: Target) -> bool:
        """Whether the target may be anywhere."""
        return any(_matches(entry, target) for entry in self.internal)

    def allows(self, target: Target) -> bool:
        return self.is_internal(target) or any(_matches(entry, target) for entry in self.hosts)


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet: nothing private, loopback, link-local, shared, multicast,
    reserved or documentary, and nothing in IPv6 that carries an IPv4 address."""
    if any(address in network for network in _NEVER if network.version == address.version):
        return False
    if address.version == 6 and address not in _GLOBAL_V6:
        return False
    return address.is_global and not address.is_multicast


def public_addresses(answers: Sequence[str]) -> tuple[Address, ...]:
    """The addresses a name has, if all of them are public; none if one of them is not, or there are none."""
    addresses = tuple(dict.fromkeys(ipaddress.ip_address(answer) for answer in answers))
    return addresses if all(map(is_public, addresses)) else ()


def _checked_host(host: str) -> str | None:
    """The host without brackets if it is well formed."""
    if host.startswith("["):
        literal = _literal(host[1:-1])
        return str(literal) if literal is not None and literal.version == 6 else None
    labels = host.split(".")
    if not all(map(_LABEL.fullmatch, labels)):
        return None
    if _NUMBER.fullmatch(labels[-1]):  # what a lenient reader would take for an address must be one
        return host if _literal(host) is not None else None
    return host


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _matches(entry: str, target: Target) -> bool:
    match = _ENTRY.fullmatch(entry)
    assert match is not None, "checked when the list was made"
    ports = (int(match["port"]),) if match["port"] else tuple(_PORTS.values())
    if target.port not in ports:
        return False
    wanted = match["host"]
    if wanted == "*":
        return "." in target.host or ":" in target.host
    if wanted.startswith("*."):
        return target.host.endswith(wanted[1:]) and target.literal is None
    return target.host == _checked_host(wanted)
