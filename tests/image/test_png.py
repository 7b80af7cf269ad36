"""PNG chunks: what is kept, what is refused. Rows I02, I07, I14 and I17."""

from __future__ import annotations

import io
import tracemalloc
import zlib

import numpy as np
import pytest
from picture_files import encode, exif_block, photo, png_chunk, png_file, png_header
from PIL import Image

from omnilmm.errors import ImageError
from omnilmm.image import png

PICTURE = photo(31, 23)
SAMPLES = np.asarray(PICTURE)
PLAIN = png_file(SAMPLES)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def refusal_of(data: bytes) -> str | None:
    with pytest.raises(ImageError) as refusal:
        png.bare(data)
    return refusal.value.code


def test_metadata_go_and_pixels_stay() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    loaded = png_file(
        SAMPLES,
        before=[
            (b"iCCP", b"x\0\0" + bomb),
            (b"zTXt", b"Comment\0\0" + bomb),
            (b"iTXt", b"Comment\0\1\0\0\0" + bomb),
            (b"eXIf", exif_block(5)),
            (b"acTL", b"\0\0\0\2\0\0\0\0"),
            (b"gAMA", b"\0\0\xb1\x8f"),
            (b"teSt", b"secret"),
        ],
    )
    tracemalloc.start()
    try:
        bare, exif = png.bare(loaded + b"<html>secret</html>")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert exif == exif_block(5)
    assert bare == PLAIN
    assert peak < 1_000_000


def test_animations_keep_their_default_picture_only() -> None:
    moving = encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)])
    bare, _ = png.bare(moving)
    assert b"fcTL" not in bare
    assert np.array_equal(pixels(bare), SAMPLES)


def test_a_hundred_thousand_chunks() -> None:
    chunk = png_chunk(b"tEXt", b"")
    assert refusal_of(PLAIN[:33] + chunk * 100_000 + PLAIN[33:]) == "image_parse_error"
    assert png.bare(PLAIN[:33] + chunk * 10_000 + PLAIN[33:])[0] == PLAIN


def test_every_cut_is_found() -> None:
    for length in range(len(PLAIN)):
        assert refusal_of(PLAIN[:length]) == "image_parse_error"


def test_every_flipped_bit_is_found() -> None:
    """Each byte but the signature's is under a checksum, or is one."""
    for position in range(8, len(PLAIN)):
        for bit in range(8):
            broken = bytearray(PLAIN)
            broken[position] ^= 1 << bit
            try:
                bare, _ = png.bare(bytes(broken))
            except ImageError:
                continue
            # Only the name of a chunk may do that: in lower case it becomes one that may be left out.
            assert bit == 5
            assert len(bare) < len(PLAIN)


def test_an_unknown_critical_chunk() -> None:
    assert refusal_of(PLAIN[:33] + png_chunk(b"CgBI", b"\0\0\0\0") + PLAIN[33:]) == "image_parse_error"


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize(
    ("bits", "colour", "channels"), [(8, 2, 3), (16, 2, 3), (8, 0, 1), (1, 0, 1), (4, 3, 1), (16, 6, 4), (8, 4, 2)]
)
@pytest.mark.parametrize(("width", "height"), [(31, 23), (1, 1), (3, 2), (5, 1), (1, 5), (8, 8)])
def test_missing_rows_are_noticed(
    width: int, height: int, bits: int, colour: int, channels: int, interlace: bool
) -> None:
    samples = np.ones((height, width, channels), np.uint16)
    kinds = {"bits": bits, "colour": colour, "interlace": interlace}
    assert png.is_complete(png_file(samples, **kinds))
    assert not png.is_complete(png_file(samples, **kinds, missing_bytes=1))


def test_a_stream_that_is_no_stream_is_incomplete() -> None:
    assert not png.is_complete(png_header(5, 5) + png_chunk(b"IDAT", b"no zlib here") + png_chunk(b"IEND", b""))
    assert not png.is_complete(png_header(5, 5) + png_chunk(b"IEND", b""))


def test_measuring_a_bomb_takes_no_memory() -> None:
    """The stream may hold far more than the rows; nobody asks for it."""
    bomb = png_header(9, 9) + png_chunk(b"IDAT", zlib.compress(bytes(100_000_000), 9)) + png_chunk(b"IEND", b"")
    tracemalloc.start()
    try:
        assert png.is_complete(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
