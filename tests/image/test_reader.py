"""One path from references to bytes, whatever the reference is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, InvalidRequest, NotFound, PayloadTooLarge
from omnilmm.image.reader import ImageReader

DATA = "data:image/png;base64,QUJD"


class Files:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def read(self, tenant: str, file_id: str) -> bytes:
        self.asked.append((tenant, file_id))
        if file_id != "file-1":
            raise NotFound("There is no such file.", code="file_not_found")
        return b"file"


class Remote:
    """A fetcher that writes down, and holds everybody until as many as `crowd` are there."""

    def __init__(self, crowd: int = 1) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.together = asyncio.Barrier(crowd)
        self.num_cancelled = 0

    async def fetch(self, url: str, *, param: str, tenant: str) -> bytes:
        self.asked.append((url, param, tenant))
        try:
            await self.together.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return url.encode()

    async def aclose(self) -> None:
        self.asked.append(("closed", "", ""))


def reader(remote: Any = None, files: Any = None, **limits: int) -> ImageReader:
    return ImageReader(ImageLimits(**limits), remote=remote, files=files)


async def read(made: ImageReader, reference: str) -> bytes:
    return await made.read(reference, param="p", tenant="acme")


async def test_every_reference_has_its_source() -> None:
    files, remote = Files(), Remote()
    made = reader(remote, files)
    assert await read(made, DATA) == b"ABC"
    assert await read(made, "file-1") == b"file"
    assert await read(made, "https://example.org/a") == b"https://example.org/a"
    assert await read(made, "HTTP://example.org/a") == b"HTTP://example.org/a"
    assert files.asked == [("acme", "file-1")]
    assert [asked[1:] for asked in remote.asked] == [("p", "acme")] * 2
    await made.aclose()
    assert remote.asked[-1][0] == "closed"


@pytest.mark.parametrize(
    "reference",
    ["https://example.org/a", "http://127.0.0.1/", "file-1", "file:///etc/passwd", "/etc/passwd", "", "file-"],
)
async def test_without_sources_nothing_but_data_is_read(reference: str) -> None:
    with pytest.raises(ImageError) as caught:
        await read(reader(), reference)
    assert (caught.value.code, caught.value.param) == ("invalid_image_url", "p")


@pytest.mark.parametrize("reference", ["file-../../etc/passwd", "file-a b", "file-" + "a" * 129, "FILE-1", "file-1\n"])
async def test_what_looks_like_an_id_and_is_none(reference: str) -> None:
    files = Files()
    with pytest.raises(ImageError) as caught:
        await read(reader(files=files), reference)
    assert caught.value.code == "invalid_image_url"
    assert files.asked == []


async def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(NotFound) as caught:
        await read(reader(files=Files()), "file-2")
    assert (caught.value.param, caught.value.code) == ("p", "file_not_found")


@pytest.mark.parametrize("num_images", [17, 100])
async def test_too_many_pictures_are_counted_before_one_is_read(num_images: int) -> None:  # I20
    remote = Remote()
    wanted = [("https://example.org/a", f"messages[{i}]") for i in range(num_images)]
    with pytest.raises(InvalidRequest) as caught:
        await reader(remote).read_all(wanted, tenant="acme")
    assert (caught.value.code, caught.value.param) == ("array_above_max_length", "messages[16]")
    assert remote.asked == []


async def test_pictures_are_fetched_side_by_side() -> None:
    wanted = [("https://example.org/a", "one"), (DATA, "two"), ("https://example.org/b", "three")]
    assert await reader(Remote(crowd=2)).read_all(wanted, tenant="acme") == {
        "one": b"https://example.org/a",
        "two": b"ABC",
        "three": b"https://example.org/b",
    }


async def test_one_bad_picture_stops_the_others() -> None:
    remote = Remote(crowd=2)  # nobody ever comes through
    wanted = [("https://example.org/a", "one"), ("data:image/png;base64,@", "two")]
    with pytest.raises(ImageError) as caught:
        await reader(remote).read_all(wanted, tenant="acme")
    assert caught.value.param == "two"
    assert remote.num_cancelled == len(remote.asked)


async def test_the_cap_of_files_holds_for_data() -> None:
    with pytest.raises(PayloadTooLarge):
        await read(reader(max_file_bytes=2), DATA)
