"""Pictures from other servers: the only place in the product that fetches a URL a client gave.

Off unless the operator names the hosts (`address.AllowList`). A name is resolved once, every address it has must be
public, and the connection goes to one of the addresses that were looked at: a name that changes its mind in between
changes nothing. There is no proxy, no cookie, no credential, no compression and, unless the operator says so, no
redirect; each one that is followed is judged like a URL of its own. One clock runs over the whole of it, waiting for a
turn included, and bytes are counted as they come. What came is a picture by its bytes or nothing at all.

The client is told that it failed, and never what the other server said.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx

from omnilmm.errors import ImageError
from omnilmm.image.address import AllowList, BadAddress, Target, parse_url, public_addresses
from omnilmm.image.headers import sniff

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""All addresses of a name, as text, best first. Raises OSError where there are none."""

_MAX_ADDRESSES = 3  # tried one after another
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = (
    ("Accept", "image/jpeg, image/png, image/webp, image/gif"),
    ("Accept-Encoding", "identity"),
    ("User-Agent", "omnilmm"),
    ("Connection", "close"),
)


@dataclass(frozen=True, slots=True)
class RemotePolicy:
    """What the operator allows. Times in seconds; `timeout_s` is for everything together.

    `max_per_tenant` pictures of one tenant are fetched at a time, and `max_at_once` in all, per process.
    """

    hosts: AllowList
    allows_http: bool = False
    max_redirects: int = 0
    timeout_s: float = 10.0
    max_bytes: int = 20 * 1024 * 1024
    max_per_tenant: int = 4
    max_at_once: int = 64


async def system_resolve(host: str, port: int) -> list[str]:
    """What the operating system's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class RemoteFetcher:
    """Fetches pictures for one process. Close it with `aclose`.

    Args:
        policy: the operator's.
        resolve: names to addresses.
        transport: sends one request to the address in its URL, without any convenience.
    """

    def __init__(
        self,
        policy: RemotePolicy,
        *,
        resolve: Resolve = system_resolve,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._policy = policy
        self._resolve = resolve
        self._transport = transport or httpx.AsyncHTTPTransport(
            trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._turns = _Turns(policy.max_per_tenant, policy.max_at_once)

    async def fetch(self, url: str, *, param: str, tenant: str) -> bytes:
        """The file at a URL.

        Raises:
            ImageError: invalid_image_url, where nothing was sent to anybody; failed_to_download_image;
                unsupported_image_media_type and empty_image_file by the bytes that came.
        """
        try:
            target = self._judge(url)
        except BadAddress as error:
            raise ImageError(str(error), param=param, code="invalid_image_url") from None
        try:
            async with asyncio.timeout(self._policy.timeout_s), self._turns.take(tenant):
                data = await self._follow(target)
            sniff(data)
        except _NoAddress:
            raise ImageError(
                "The host of the URL has no public address.", param=param, code="invalid_image_url"
            ) from None
        except TimeoutError:
            raise _failed(param, f"It took longer than {self._policy.timeout_s:g} s.") from None
        except _Failed as error:
            raise _failed(param, str(error)) from None
        except ImageError as error:
            if error.code == "invalid_image_format":
                raise _failed(param, "What came is not a picture we know.") from None
            error.param = param
            raise
        return data

    async def aclose(self) -> None:
        await self._transport.aclose()

    def _judge(self, url: str) -> Target:
        target = parse_url(url)
        if target.scheme == "http" and not self._policy.allows_http:
            raise BadAddress("Pictures are fetched over https only.")
        if not self._policy.hosts.allows(target):
            raise BadAddress("Pictures are not fetched from this host and port.")
        return target

    async def _follow(self, target: Target) -> bytes:
        answer = await self._get(target)
        for _ in range(self._policy.max_redirects):
            if isinstance(answer, bytes):
                return answer
            try:
                target = self._judge(answer.location)
                answer = await self._get(target)
            except (BadAddress, _NoAddress):
                raise _Failed("It redirects to where pictures are not fetched from.") from None
        if isinstance(answer, bytes):
            return answer
        raise _Failed("It redirects too often." if self._policy.max_redirects else "Redirects are not followed.")

    async def _get(self, target: Target) -> bytes | _Redirect:
        unreachable = _Failed("It could not be reached.")
        for address in (await self._addresses(target))[:_MAX_ADDRESSES]:
            try:
                response = await self._transport.handle_async_request(self._request(target, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
                raise unreachable from None
            try:
                return await self._read(response, target)
            except (httpx.HTTPError, OSError, ValueError):
                raise _Failed("The connection broke off.") from None
            finally:
                await response.aclose()
        raise unreachable

    async def _addresses(self, target: Target) -> list[str]:
        """Where to connect: looked up once, and all of it looked at."""
        literal = target.literal
        try:
            answers = [str(literal)] if literal is not None else await self._resolve(target.host, target.port)
        except (OSError, UnicodeError):
            raise _NoAddress from None
        if self._policy.hosts.is_internal(target):
            return list(answers)
        addresses = public_addresses(answers)
        if not addresses:
            raise _NoAddress
        return [str(address) for address in addresses]

    def _request(self, target: Target, address: str) -> httpx.Request:
        step_s = self._policy.timeout_s / 2  # so that a second address has its chance
        extensions: dict[str, object] = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), step_s)}
        if target.literal is None:
            extensions["sni_hostname"] = target.host  # also the name the certificate must have
        host = f"[{address}]" if ":" in address else address
        url = httpx.URL(f"{target.scheme}://{host}:{target.port}{target.path}")
        return httpx.Request("GET", url, headers=[("Host", target.authority), *_HEADERS], extensions=extensions)

    async def _read(self, response: httpx.Response, target: Target) -> bytes | _Redirect:
        if response.status_code in _REDIRECTS and "location" in response.headers:
            base = f"{target.scheme}://{target.authority}{target.path}"
            return _Redirect(urljoin(base, response.headers["location"]))
        if response.status_code != 200:
            raise _Failed("The other server did not give it.")
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Failed("The other server compressed it.")
        too_large = _Failed(f"It has more than {self._policy.max_bytes} bytes.")
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._policy.max_bytes:
            raise too_large
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > self._policy.max_bytes:
                raise too_large
        if not data:
            raise _Failed("The other server gave nothing.")
        return bytes(data)


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


class _Failed(Exception):
    """What to tell the client."""


class _NoAddress(Exception):
    pass


class _Turns:
    """How many may fetch at a time, of one tenant and in all. A tenant that waits does not keep others waiting."""

    def __init__(self, per_tenant: int, at_once: int) -> None:
        self._per_tenant = per_tenant
        self._all = asyncio.Semaphore(at_once)
        self._tenants: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}

    @asynccontextmanager
    async def take(self, tenant: str) -> AsyncIterator[None]:
        own, users = self._tenants.setdefault(tenant, (asyncio.Semaphore(self._per_tenant), []))
        users.append(None)
        try:
            async with own, self._all:
                yield
        finally:
            users.pop()
            if not users:
                del self._tenants[tenant]


def _failed(param: str, why: str) -> ImageError:
    return ImageError(f"The picture could not be downloaded. {why}", param=param, code="failed_to_download_image")
