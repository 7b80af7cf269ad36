"""A server on loopback that says exactly the bytes a test wants, and what stands in for the world's names."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Site:
    """A running server: its port, and the heads of the requests it was sent."""

    port: int = 0
    heads: list[str] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0


@asynccontextmanager
async def site(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    """Serve every connection with `serve`, after its request has been read."""
    here = Site()
    tasks: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        here.num_open += 1
        here.most_open = max(here.most_open, here.num_open)
        try:
            here.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            here.num_open -= 1
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    here.port = server.sockets[0].getsockname()[1]
    try:
        yield here
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def says(body: bytes, *, status: str = "200 OK", length: int | None = None, **headers: str) -> Serve:
    """A plain answer. `length` is what it says its length is."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()

    return serve


@dataclass
class Names:
    """A resolver that knows what it is told, and counts. A list of lists is given out one after another."""

    addresses: dict[str, list[str] | list[list[str]]]
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        found = self.addresses.get(host)
        if found is None:
            raise OSError("no such name")
        if isinstance(found[0], list):
            return found.pop(0) if len(found) > 1 else found[0]  # type: ignore[return-value]
        return found  # type: ignore[return-value]


class Wire(httpx.AsyncBaseTransport):
    """Where requests would leave the machine: they are written down, and answered with a picture."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(self.body))


def certificate(folder: Path, name: str) -> ssl.SSLContext:
    """A server's side of TLS with a certificate for `name` that nobody has signed but itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = [x509.DNSName(name)]
    if name[0].isdigit():
        alternatives = [x509.IPAddress(ipaddress.ip_address(name))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
