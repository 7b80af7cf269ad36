"""Which URLs lead to a file, and the caps that need no pixel."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
from picture_files import encode, jpeg_segment, photo, png_chunk, png_header

from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, InvalidRequest, PayloadTooLarge
from omnilmm.image.source import check_picture, check_request_pixels, located, read_image_url


def test_data_uris_lead_to_a_file(limits: ImageLimits) -> None:
    assert read_image_url("DATA:image/png;base64,QUJD", param="p", limits=limits) == b"ABC"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/cat.png",
        "HTTPS://example.org/cat.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.org/cat.png",
        "gopher://x",
        "blob:x",
        "javascript:alert(1)",
        "//example.org/cat.png",
        " data:image/png;base64,QUJD",
        "x" * 100_000,
        "",
        ":",
    ],
)
def test_other_urls_lead_nowhere(url: str, limits: ImageLimits) -> None:
    with pytest.raises(ImageError) as refusal:
        read_image_url(url, param="p", limits=limits)
    assert (refusal.value.code, refusal.value.param) == ("invalid_image_url", "p")
    assert ("switched off" in refusal.value.message) == url.lower().startswith("http")
    assert not url.strip() or url == ":" or url not in refusal.value.message


def grey_png(width: int, height: int) -> bytes:
    """A valid all-black grey PNG of any size, compressed row by row."""
    squeeze = zlib.compressobj(1)
    body = b"".join(squeeze.compress(bytes(width + 1)) for _ in range(height)) + squeeze.flush()
    return png_header(width, height, 8, 0) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def test_bombs_are_refused_from_their_header_alone(limits: ImageLimits) -> None:
    """Rows I04 and I05: Pillow itself would only warn about the second."""
    bombs = [png_header(50_000, 50_000), grey_png(13_000, 13_000)]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(ImageError) as refusal:
                check_picture(bomb, limits)
            assert refusal.value.code == "image_too_large"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("width", "height", "code"),
    [
        (1, 1, None),
        (1, 8192, None),
        (8192, 1, None),
        (8000, 4500, None),  # exactly max_pixels
        (8000, 4501, "image_too_large"),
        (1, 10_000, "image_too_large"),
        (10_000, 1, "image_too_large"),
        (0, 5, "image_too_small"),
        (5, 0, "image_too_small"),
        (0, 0, "image_too_small"),
        (2**32 - 1, 2**32 - 1, "image_too_large"),
    ],
)
def test_caps_on_size(width: int, height: int, code: str | None, limits: ImageLimits) -> None:
    data = png_header(width, height)
    if code is None:
        assert check_picture(data, limits) == (width, height)
        return
    with pytest.raises(ImageError) as refusal:
        check_picture(data, limits)
    assert refusal.value.code == code


def test_zero_height_in_a_jpeg(limits: ImageLimits) -> None:
    frame = jpeg_segment(0xC0, bytes([8, 0, 0, 0, 9, 1, 1, 0x11, 0]))
    with pytest.raises(ImageError) as refusal:
        check_picture(b"\xff\xd8" + frame, limits)
    assert refusal.value.code == "image_too_small"


def test_the_byte_cap_holds_for_files_too(limits: ImageLimits) -> None:
    data = encode(photo(20, 20), "PNG")
    check_picture(data, limits.resolve(max_file_bytes=len(data)))
    with pytest.raises(PayloadTooLarge) as refusal:
        check_picture(data, limits.resolve(max_file_bytes=len(data) - 1))
    assert (refusal.value.status, refusal.value.code) == (413, "image_file_too_large")


def test_the_pictures_of_a_request_share_a_budget(limits: ImageLimits) -> None:
    """Row I06."""
    check_request_pixels([], limits)
    check_request_pixels([(2000, 2000)] * 16, limits)  # exactly 64 MP
    with pytest.raises(ImageError) as refusal:
        check_request_pixels([(2000, 2000)] * 15 + [(2000, 2001)], limits, param="messages")
    assert (refusal.value.code, refusal.value.param) == ("image_too_large", "messages")
    with pytest.raises(ImageError):
        check_request_pixels([(6000, 6000)] * 16, limits)


def test_located_names_the_field() -> None:
    with pytest.raises(InvalidRequest) as refusal, located("messages[3]"):
        raise InvalidRequest("no")
    assert refusal.value.param == "messages[3]"
