"""JPEG segments: what is kept, what is refused. Rows I02, I14, I15, I17 and I19."""

from __future__ import annotations

import io

import numpy as np
import pytest
from picture_files import encode, exif_block, jpeg_segment, jpeg_with, photo
from PIL import Image

from omnilmm.errors import ImageError
from omnilmm.image import jpeg

PICTURE = photo(40, 24)
EXIF = b"Exif\0\0" + exif_block(6)
VARIANTS = {
    "baseline": encode(PICTURE, "JPEG", quality=60),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "grey": encode(PICTURE.convert("L"), "JPEG"),
    "cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "rgb": encode(PICTURE, "JPEG", keep_rgb=True),
    "restarts": encode(PICTURE, "JPEG", restart_marker_blocks=2),
    "restarts_progressive": encode(PICTURE, "JPEG", restart_marker_rows=1, progressive=True),
}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def scan(data: bytes, index: int = 0) -> jpeg.Segment:
    return [segment for segment in jpeg.segments(data) if segment.marker == 0xDA][index]


def refusal_of(data: bytes) -> str | None:
    with pytest.raises(ImageError) as refusal:
        jpeg.bare(data)
    return refusal.value.code


@pytest.mark.parametrize("name", VARIANTS)
def test_metadata_go_and_pixels_stay(name: str) -> None:
    data = VARIANTS[name]
    secret = b"Wednesday at the lake"
    loaded = jpeg_with(
        data,
        jpeg_segment(0xE1, EXIF + secret),
        jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + secret),
        *(jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 160]) + secret + bytes(65_000)) for i in range(1, 161)),
        jpeg_segment(0xE2, b"MPF\0" + secret),
        jpeg_segment(0xED, b"Photoshop 3.0\0" + secret),
        jpeg_segment(0xFE, secret),
    )
    bare, exif = jpeg.bare(loaded + b"PK\x03\x04 and an archive " + secret)
    assert exif == EXIF + secret
    assert secret not in bare
    assert len(bare) <= len(data)
    assert np.array_equal(pixels(bare), pixels(data))


def test_a_thumbnail_inside_exif_is_no_picture() -> None:
    data = jpeg_with(VARIANTS["baseline"], jpeg_segment(0xE1, EXIF + encode(photo(8, 8), "JPEG")))
    assert jpeg.size(data) == (40, 24)
    assert np.array_equal(pixels(jpeg.bare(data)[0]), pixels(VARIANTS["baseline"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_cut_is_found(name: str) -> None:
    data = VARIANTS[name]
    for length in range(3, len(data)):
        assert refusal_of(data[:length]) == "image_parse_error"


@pytest.mark.parametrize(
    "marker",
    [
        *(bytes([0xFF, number]) for number in (0x01, 0x80, 0xC0, 0xD0, 0xD7, 0xD8, 0xDA)),
        b"\xff\xda\0\2",
        b"\xff\xfe\0\2",
    ],
)
def test_a_marker_inside_the_coded_data(marker: bytes) -> None:
    """A decoder takes it for the end of the data and makes the rest of the picture grey."""
    data = VARIANTS["baseline"]
    middle = sum(scan(data)[2:]) // 2
    broken = data[:middle] + marker + data[middle:]
    assert refusal_of(broken) == "image_parse_error"


def test_restart_markers_out_of_order() -> None:
    data = VARIANTS["restarts"]
    assert data.count(b"\xff\xd1") == 1
    assert refusal_of(data.replace(b"\xff\xd1", b"\xff\xd2")) == "image_parse_error"


def test_stray_bytes_between_segments_are_skipped() -> None:
    data = VARIANTS["baseline"]
    assert np.array_equal(pixels(jpeg.bare(data[:2] + b"\0\0junk\xff\xff" + data[2:])[0]), pixels(data))


@pytest.mark.parametrize(
    "marker",
    [0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE, 0xF7],
    ids=lambda marker: f"{marker:02x}",
)
def test_arithmetic_lossless_and_hierarchical_pictures(marker: int) -> None:
    data = VARIANTS["baseline"].replace(b"\xff\xc0", bytes([0xFF, marker]))
    with pytest.raises(ImageError) as refusal:
        jpeg.size(data)
    assert refusal.value.code == "unsupported_image_media_type"


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [(0, 12, "unsupported_image_media_type"), (5, 2, "invalid_image_mode"), (5, 0, "invalid_image_mode")],
    ids=["12_bits", "2_components", "no_component"],
)
def test_frames_we_do_not_take(offset: int, value: int, code: str) -> None:
    data = bytearray(VARIANTS["baseline"])
    data[data.index(b"\xff\xc0") + 4 + offset] = value
    with pytest.raises(ImageError) as refusal:
        jpeg.size(bytes(data))
    assert refusal.value.code == code


def test_a_thousand_scans() -> None:
    data = VARIANTS["progressive"]
    last = scan(data, -1)
    again = data[last.start : last.end]
    assert jpeg.bare(data[: last.end] + again * 50 + data[last.end :])
    assert refusal_of(data[: last.end] + again * 1000 + data[last.end :]) == "image_parse_error"


@pytest.mark.parametrize(
    "data",
    [b"\xff\xd8\xff\xd9", b"\xff\xd8" + jpeg_segment(0xC0, b"\x08\0\x09\0\x09"), b"\xff\xd8\xff\xda\0\2\xff\xd9"],
)
def test_pictures_without_a_frame(data: bytes) -> None:
    with pytest.raises(ImageError) as refusal:
        jpeg.size(data)
    assert refusal.value.code == "image_parse_error"
