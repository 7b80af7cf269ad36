"""Pictures from other servers: the U rows of the catalogue, against a server on loopback and names we make up."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from picture_files import encode, photo
from remote_servers import Names, Site, Wire, certificate, says, site

from omnilmm.errors import ImageError
from omnilmm.image.address import AllowList
from omnilmm.image.remote import RemoteFetcher, RemotePolicy, system_resolve

PICTURE = encode(photo(20, 10), "PNG")


@asynccontextmanager
async def fetcher(
    *hosts: str, internal: tuple[str, ...] = (), names: Any = None, transport: Any = None, **policy: Any
) -> AsyncIterator[RemoteFetcher]:
    made = RemoteFetcher(
        RemotePolicy(AllowList(hosts, internal), **{"allows_http": True, **policy}),
        resolve=names or Names({}),
        transport=transport,
    )
    try:
        yield made
    finally:
        await made.aclose()


@asynccontextmanager
async def shop(serve: Any, **policy: Any) -> AsyncIterator[tuple[Site, RemoteFetcher, str]]:
    """A server known as pictures.internal, a fetcher that may go there, and the URL of a picture."""
    async with site(serve) as here:
        host = f"pictures.internal:{here.port}"
        names = Names({"pictures.internal": ["127.0.0.1"]})
        internal = (host, *policy.pop("internal", ()))
        async with fetcher(internal=internal, names=policy.pop("names", names), **policy) as fetch:
            yield here, fetch, f"http://{host}/cat.png"


async def refused(fetch: RemoteFetcher, url: str, tenant: str = "acme") -> tuple[str | None, str]:
    with pytest.raises(ImageError) as caught:
        await fetch.fetch(url, param="p", tenant=tenant)
    assert caught.value.param == "p"
    assert url not in caught.value.message
    return caught.value.code, caught.value.message


async def test_a_picture_is_fetched() -> None:
    async with shop(says(PICTURE, Content_Type="text/html")) as (here, fetch, url):
        assert await fetch.fetch(url + "?token=secret", param="p", tenant="acme") == PICTURE
    (head,) = here.heads
    assert head.startswith("GET /cat.png?token=secret HTTP/1.1\r\n")
    lines = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
    assert lines["Host"] == f"pictures.internal:{here.port}"
    assert lines["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & lines.keys()


# -- nothing is sent ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",  # U01
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://017700000001/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:8.8.8.8]/",
        "http://[64:ff9b::7f00:1]/",
        "http://0.0.0.0/",
        "http://localhost./",
        "http://localhost/",
        "http://169.254.169.254/latest/meta-data",  # U02
        "http://[fd00:ec2::254]/",
        "http://metadata.google.internal/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://public.example:6379/",
        "http://public.example:8265/",
        "http://mixed.example/",  # U04
        "http://unknown.example/",
        "http://127.0.0.1:6666\\@1.1.1.1",  # U05
        "http://user:word@public.example/",
        "http://public.example:22/",
        "file:///etc/passwd",  # U06
        "gopher://public.example/",
    ],
)
async def test_not_a_packet_leaves(url: str) -> None:
    names = Names(
        {
            "public.example": ["8.8.8.8"],
            "mixed.example": ["8.8.8.8", "127.0.0.1"],
            "metadata.google.internal": ["169.254.169.254"],
            "localhost": ["127.0.0.1", "::1"],
        }
    )
    wire = Wire(PICTURE)
    async with fetcher("*", names=names, transport=wire) as fetch:
        assert (await refused(fetch, url))[0] == "invalid_image_url"
    assert wire.requests == []


async def test_a_public_host_is_reached_at_the_address_that_was_looked_at() -> None:
    names = Names({"public.example": [["8.8.8.8", "2606:2800:220:1::1"], ["127.0.0.1"]]})
    wire = Wire(PICTURE)
    async with fetcher("public.example", names=names, transport=wire) as fetch:
        assert await fetch.fetch("https://public.example/a", param="p", tenant="acme") == PICTURE
        (request,) = wire.requests
        assert request.url == "https://8.8.8.8/a"
        assert request.headers["host"] == "public.example"
        assert request.extensions["sni_hostname"] == "public.example"
        assert names.asked == ["public.example"]  # once: what it would say next does not matter
        await refused(fetch, "https://public.example/a")
    assert len(wire.requests) == 1


async def test_only_hosts_of_the_list() -> None:
    wire = Wire(PICTURE)
    names = Names({"a.example": ["8.8.8.8"], "b.example": ["8.8.8.8"]})
    async with fetcher("a.example", names=names, transport=wire, allows_http=False) as fetch:
        assert await fetch.fetch("https://a.example/", param="p", tenant="acme") == PICTURE
        assert (await refused(fetch, "https://b.example/"))[0] == "invalid_image_url"
        assert "https" in (await refused(fetch, "http://a.example/"))[1]
    assert names.asked == ["a.example"]
    assert len(wire.requests) == 1


async def test_literal_addresses_go_where_they_say() -> None:
    wire = Wire(PICTURE)
    async with fetcher("*", transport=wire) as fetch:
        await fetch.fetch("https://[2606:2800:0220:1::1]/a", param="p", tenant="acme")
    assert wire.requests[0].url == "https://[2606:2800:220:1::1]/a"
    assert "sni_hostname" not in wire.requests[0].extensions


# -- redirects (U03) ----------------------------------------------------------------------------------


def moved(location: str, status: int = 302) -> Any:
    return says(b"", status=f"{status} Moved", Location=location)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status: int) -> None:
    async with shop(moved("/other.png", status)) as (here, fetch, url):
        assert (await refused(fetch, url))[0] == "failed_to_download_image"
    assert len(here.heads) == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://169.254.169.254/",
        "http://other.internal/",
        "http://private.example/",
        "//private.example/",
        "file:///etc/passwd",
        "http://user@pictures.internal/",
        "gopher://x/",
        "http://pictures.internal:1/",
        "\x80\xff",
        "",
    ],
)
async def test_every_hop_is_judged(location: str) -> None:
    names = Names({"pictures.internal": ["127.0.0.1"], "private.example": ["10.0.0.1"]})
    async with shop(moved(location), names=names, max_redirects=3) as (here, fetch, url):
        assert (await refused(fetch, url))[0] == "failed_to_download_image"
    assert len(here.heads) == (4 if location == "" else 1)  # nowhere is where we are


async def test_a_redirect_to_a_private_address_is_refused_by_its_address() -> None:
    names = Names({"pictures.internal": ["127.0.0.1"], "private.example": ["10.0.0.1"]})
    async with site(moved("http://private.example/")) as here:
        host = f"pictures.internal:{here.port}"
        async with fetcher("*", internal=(host,), names=names, max_redirects=3) as fetch:
            assert (await refused(fetch, f"http://{host}/"))[0] == "failed_to_download_image"
    assert names.asked == ["pictures.internal", "private.example"]


async def test_a_redirect_to_a_host_that_is_not_listed_is_refused_by_its_name() -> None:
    class Mover(Wire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await super().handle_async_request(request)
            return httpx.Response(302, headers={"location": "https://other.example/"}, stream=httpx.ByteStream(b""))

    names, wire = Names({"listed.example": ["8.8.8.8"], "other.example": ["8.8.4.4"]}), Mover(PICTURE)
    async with fetcher("listed.example", names=names, transport=wire, max_redirects=3) as fetch:
        assert (await refused(fetch, "https://listed.example/"))[0] == "failed_to_download_image"
    assert len(wire.requests) == 1
    assert names.asked == ["listed.example"]


async def test_allowed_redirects_are_followed_up_to_their_number() -> None:
    hops = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hops.append(None)
        answer = moved(f"/hop{len(hops)}") if len(hops) <= 2 else says(PICTURE)
        await answer(reader, writer)

    async with shop(serve, max_redirects=2) as (here, fetch, url):
        assert await fetch.fetch(url, param="p", tenant="acme") == PICTURE
    assert [head.split()[1] for head in here.heads] == ["/cat.png", "/hop1", "/hop2"]
    hops.clear()
    async with shop(serve, max_redirects=1) as (here, fetch, url):
        assert (await refused(fetch, url))[0] == "failed_to_download_image"
    assert len(here.heads) == 2


# -- what the other server says -----------------------------------------------------------------------


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def _silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await writer.drain()


async def _endless_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Junk: " + b"a" * 1000 + b"\r\n")
        await writer.drain()


async def _garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x01 what is HTTP\r\n\r\n")
    await writer.drain()


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    return None


ANSWERS = {
    "declared_huge": says(b"x", length=10 * 10**12),  # U07
    "declared_long": says(PICTURE, length=len(PICTURE) + 5),
    "endless": _endless,
    "endless_head": _endless_head,
    "gzip": says(gzip.compress(bytes(10**6)), Content_Encoding="gzip"),
    "encoded_by_word": says(PICTURE, Content_Encoding="gzip"),
    "encoded_twice": says(PICTURE, Content_Encoding="identity, br"),
    "garbage": _garbage,
    "hang_up": _hang_up,
    "html": says(b"<html>secret words</html>", Content_Type="image/png"),  # U09
    "nothing": says(b"", status="204 No Content"),
    "empty": says(b""),
    "not_found": says(b"secret words", status="404 Not Found"),
    "broken": says(b"secret words", status="500 Broken"),
    "partial": says(PICTURE, status="206 Partial Content"),
    "not_modified": says(b"", status="304 Not Modified"),
    "redirect_to_nowhere": says(b"", status="302 Found"),
}


@pytest.mark.parametrize("name", ["declared_huge", "endless"])
async def test_bytes_are_counted(name: str) -> None:
    async with shop(ANSWERS[name], max_bytes=100_000, timeout_s=60) as (_, fetch, url):
        assert "more than 100000 bytes" in (await refused(fetch, url))[1]


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
async def test_what_is_no_picture_is_a_failed_download(answer: Any) -> None:
    async with shop(answer, max_bytes=100_000) as (_, fetch, url):
        code, message = await refused(fetch, url)
    assert code == "failed_to_download_image"
    assert "secret" not in message
    assert not any(digits in message for digits in ("404", "500", "204"))


async def test_other_kinds_of_pictures_are_named() -> None:
    async with shop(says(b"II*\0" + bytes(100))) as (_, fetch, url):
        assert (await refused(fetch, url))[0] == "unsupported_image_media_type"


async def test_what_comes_after_the_declared_length_is_not_read() -> None:
    async with shop(says(PICTURE + PICTURE, length=len(PICTURE))) as (_, fetch, url):
        assert await fetch.fetch(url, param="p", tenant="acme") == PICTURE


async def test_the_byte_cap_is_exact() -> None:
    async with shop(says(PICTURE), max_bytes=len(PICTURE)) as (_, fetch, url):
        assert await fetch.fetch(url, param="p", tenant="acme") == PICTURE
    async with shop(says(PICTURE), max_bytes=len(PICTURE) - 1) as (_, fetch, url):
        assert (await refused(fetch, url))[0] == "failed_to_download_image"


@pytest.mark.parametrize("serve", [_drip, _silence], ids=["drip", "silence"])
async def test_the_time_is_for_everything_together(serve: Any) -> None:  # U08
    async with shop(serve, timeout_s=0.3) as (_, fetch, url):
        code, message = await refused(fetch, url)
    assert code == "failed_to_download_image"
    assert "broke off" in message or "longer than 0.3 s" in message or "reached" in message


async def test_a_name_server_that_hangs_costs_time_and_no_more() -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async with fetcher("public.example", names=hang, timeout_s=0.1) as fetch:
        code, message = await refused(fetch, "https://public.example/")
    assert code == "failed_to_download_image"
    assert "longer than 0.1 s" in message


async def test_a_closed_port_is_unreachable_and_the_next_address_is_tried() -> None:
    async with site(says(PICTURE)) as gone:
        port = gone.port
    names = Names({"pictures.internal": ["127.0.0.1"]})
    async with fetcher(internal=(f"pictures.internal:{port}",), names=names) as fetch:
        assert (await refused(fetch, f"http://pictures.internal:{port}/"))[0] == "failed_to_download_image"
    both = Names({"pictures.internal": ["127.0.0.2", "127.0.0.1"]})  # nobody listens at the first
    async with shop(says(PICTURE), names=both) as (here, fetch, url):
        assert await fetch.fetch(url, param="p", tenant="acme") == PICTURE
    assert len(here.heads) == 1


async def test_a_certificate_must_be_good(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    context = certificate(tmp_path, "pictures.internal")
    async with site(says(PICTURE), tls=context) as here:
        host = f"pictures.internal:{here.port}"
        names = Names({"pictures.internal": ["127.0.0.1"]})
        async with fetcher(internal=(host,), names=names) as fetch:  # signed by nobody we know
            assert (await refused(fetch, f"https://{host}/"))[0] == "failed_to_download_image"
        trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        transport = httpx.AsyncHTTPTransport(verify=trusting, trust_env=False)
        async with fetcher(internal=(host,), names=names, transport=transport) as fetch:
            assert await fetch.fetch(f"https://{host}/", param="p", tenant="acme") == PICTURE
        other = f"other.internal:{here.port}"  # a good certificate, of somebody else
        elsewhere = Names({"other.internal": ["127.0.0.1"]})
        transport = httpx.AsyncHTTPTransport(verify=trusting, trust_env=False)
        async with fetcher(internal=(other,), names=elsewhere, transport=transport) as fetch:
            assert (await refused(fetch, f"https://{other}/"))[0] == "failed_to_download_image"


# -- tenants (U11) ------------------------------------------------------------------------------------


async def test_a_slow_tenant_leaves_room_for_others() -> None:
    crowd, release = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if here.num_open == 3:
            crowd.set()
        if here.heads[-1].startswith("GET /slow"):
            await release.wait()
        await says(PICTURE)(reader, writer)

    async with shop(serve, max_per_tenant=3, timeout_s=60) as (here, fetch, url):
        slow = url.replace("cat", "slow")
        waiting = [asyncio.create_task(fetch.fetch(slow, param="p", tenant="slow")) for _ in range(20)]
        await crowd.wait()
        assert await fetch.fetch(url, param="p", tenant="quick") == PICTURE
        assert not any(task.done() for task in waiting)
        release.set()
        assert await asyncio.gather(*waiting) == [PICTURE] * 20
        assert here.most_open <= 4  # three of one and one of the other
        assert fetch._turns._tenants == {}  # nothing is remembered of who has gone


async def test_waiting_for_a_turn_counts() -> None:
    async with shop(_silence, max_per_tenant=1, timeout_s=0.3) as (here, fetch, url):
        codes = await asyncio.gather(*(refused(fetch, url) for _ in range(4)))
    assert {code for code, _ in codes} == {"failed_to_download_image"}
    assert len(here.heads) <= 2


async def test_a_caller_who_leaves_frees_the_turn() -> None:
    arrived = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if arrived.is_set():
            await says(PICTURE)(reader, writer)
        arrived.set()
        await reader.read()  # until the other side has closed

    async with shop(serve, max_per_tenant=1, timeout_s=60) as (_, fetch, url):
        leaver = asyncio.create_task(fetch.fetch(url, param="p", tenant="acme"))
        await arrived.wait()
        leaver.cancel()
        assert await fetch.fetch(url, param="p", tenant="acme") == PICTURE


async def test_the_systems_resolver() -> None:
    assert set(await system_resolve("localhost", 80)) <= {"127.0.0.1", "::1"}
