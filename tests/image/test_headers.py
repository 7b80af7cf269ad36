"""Formats and sizes from the first bytes: rows I01, I03, I10, I13, I15 and I16."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from fuzzing import FUZZ
from hypothesis import given
from hypothesis import strategies as st
from picture_files import PNG_SIGNATURE, encode, exif_block, jpeg_segment, photo
from PIL import Image

from omnilmm.errors import ImageError
from omnilmm.image.headers import picture_size, sniff

PICTURE = photo(37, 21)


def files() -> dict[str, bytes]:
    return {
        "baseline": encode(PICTURE, "JPEG"),
        "progressive": encode(PICTURE, "JPEG", progressive=True, exif=b"Exif\0\0" + exif_block(6)),
        "grey": encode(PICTURE.convert("L"), "JPEG"),
        "cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
        "png": encode(PICTURE, "PNG"),
        "webp_lossy": encode(PICTURE, "WEBP"),
        "webp_lossless": encode(PICTURE, "WEBP", lossless=True),
        "webp_alpha": encode(PICTURE.convert("RGBA"), "WEBP", exif=exif_block(3)),
        "webp_animated": encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)]),
        "gif": encode(PICTURE.convert("P"), "GIF", comment=b"x" * 600),
        "gif_grey": encode(PICTURE.convert("L"), "GIF"),
    }


@pytest.mark.parametrize("name", files())
def test_sizes_are_read_without_decoding(name: str) -> None:
    data = files()[name]
    assert picture_size(data) == (37, 21)
    assert sniff(data) == Image.open(io.BytesIO(data)).format


def refusal_of(data: bytes) -> str | None:
    with pytest.raises(ImageError) as refusal:
        picture_size(data)
    return refusal.value.code


def test_no_bytes_at_all() -> None:
    assert refusal_of(b"") == "empty_image_file"


@pytest.mark.parametrize(
    "magic", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0", PNG_SIGNATURE, b"GIF89a", b"GIF87a", b"RIFF\4\0\0\0WEBP"]
)
def test_a_magic_number_and_nothing_else(magic: bytes) -> None:
    assert refusal_of(magic) == "image_parse_error"


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"BM",
        b"BMW drivers",
        np.random.default_rng(0).bytes(5000),
        b"<!doctype html><html><svg></svg></html>",
        b"<html><body>hi",
        b"PK\x03\x04" + bytes(100),
        b"\x7fELF" + bytes(100),
        b"\x89PN",
        b"RIFF\4\0\0\0WAVE",
        b"{}",
        b"<?xml version='1.0'?><feed/>",
    ],
)
def test_what_is_no_picture(data: bytes) -> None:
    assert refusal_of(data) == "invalid_image_format"


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><image href="http://169.254.169.254/"/></svg>'
FOREIGN = {
    "tiff": encode(PICTURE, "TIFF"),
    "float_tiff": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    "big_endian_tiff": b"MM\0*" + bytes(20),
    "bmp": encode(PICTURE, "BMP"),
    "jpeg2000": encode(PICTURE, "JPEG2000"),
    "jpeg2000_codestream": encode(PICTURE, "JPEG2000", no_jp2=True),
    "avif": encode(PICTURE, "AVIF"),
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "jxl": b"\xff\x0a" + bytes(20),
    "jxl_box": b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a",
    "ico": encode(PICTURE, "ICO"),
    "icns": encode(PICTURE.resize((32, 32)), "ICNS"),
    "dds": encode(PICTURE, "DDS"),
    "pdf": encode(PICTURE, "PDF"),
    "eps": encode(PICTURE, "EPS"),
    "ppm": encode(PICTURE, "PPM"),
    "psd": b"8BPS\0\1" + bytes(20),
    "fits": b"SIMPLE  =                    T" + bytes(50),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "emf": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(20),
    "svg": SVG,
    "svg_prolog": b'\xef\xbb\xbf  <?xml version="1.0"?>\n<!-- x -->\n' + SVG,
    "svg_entities": b"<!DOCTYPE svg [" + b"<!ENTITY a 'aaaaaaaaaaaaaaaa'>" * 100 + b"]>" + SVG,
    "mp4": b"\0\0\0\x18ftypmp42",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_we_know_and_do_not_take(name: str) -> None:
    assert refusal_of(FOREIGN[name]) == "unsupported_image_media_type"


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int], before: bytes = b"") -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0) + before + b"," + struct.pack("<HHHHB", *frame, 0)


def test_the_canvas_of_a_gif_counts() -> None:
    assert picture_size(gif((65_535, 65_535), (0, 0, 1, 1))) == (65_535, 65_535)
    assert picture_size(gif((10, 10), (5, 6, 20, 30))) == (25, 36)  # the frame sticks out
    assert picture_size(gif((10, 10), (0, 0, 1, 1), before=b"!\xfe\x03abc\x02de\0")) == (10, 10)


@pytest.mark.parametrize("tail", [b"", b";", b"!\xfe\xff", b"!", b"!\xfe\x01a" * 3])
def test_a_gif_without_a_picture(tail: bytes) -> None:
    assert refusal_of(b"GIF89a\1\0\1\0\0\0\0" + tail) == "image_parse_error"


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\x01a\0" * 4_000_000,
        b"\xff\xd8\xff\xe0\0\2" + jpeg_segment(0xFE, b"") * 5_000_000,
        b"\xff\xd8\xff" + b"\xff" * 20_000_000,
        b"\xff\xd8\xff\xe0\0\2" + bytes(20_000_000),
        b"\xff\xd8\xff\xe0\0\2" + b"\xff\xd0" * 10_000_000,
    ],
    ids=["gif_comments", "jpeg_comments", "jpeg_fill", "jpeg_junk", "jpeg_restarts"],
)
def test_long_headers_are_given_up_quickly(data: bytes) -> None:
    before = time.process_time()
    assert refusal_of(data) == "image_parse_error"
    assert time.process_time() - before < 0.5


@FUZZ
@given(
    magic=st.sampled_from(
        [b"", b"\xff\xd8\xff", PNG_SIGNATURE, b"GIF89a", b"RIFF\x20\0\0\0WEBPVP8X", *FOREIGN.values()]
    ),
    rest=st.binary(max_size=64),
)
def test_any_bytes_are_measured_or_refused(magic: bytes, rest: bytes) -> None:
    try:
        width, height = picture_size(magic[:40] + rest)
    except ImageError:
        return
    assert width >= 0
    assert height >= 0
