"""Decoding what is too large, damaged, or not for us: rows I02, I13, I15 and the fuzzed rest."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import encode, exif_block, photo, png_chunk, png_file, png_header
from PIL import Image

from omnilmm.config import ImageLimits, ImagePolicy, InputHandling
from omnilmm.errors import IMAGE_CODES, ImageError, PayloadTooLarge, StartupError
from omnilmm.image import jpeg, transform
from omnilmm.image.transform import check_pillow, decode, prepare

SAFE, ORIGINAL = InputHandling.SAFE, InputHandling.ORIGINAL
LIMITS = ImageLimits()
PICTURE = photo(24, 16)
RGB = np.asarray(PICTURE)


def decoded(data: bytes, handling: InputHandling = SAFE) -> np.ndarray:
    image = decode(data, handling, LIMITS)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal_of(data: bytes, handling: InputHandling = SAFE, limits: ImageLimits = LIMITS) -> str | None:
    with pytest.raises(ImageError) as refusal:
        decode(data, handling, limits)
    assert "PIL" not in refusal.value.message
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None
    return refusal.value.code


# -- caps ---------------------------------------------------------------------------------------------


def test_caps_come_before_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(transform, "_DECODERS", dict.fromkeys(transform._DECODERS, must_not_run))
    assert refusal_of(png_header(50_000, 50_000)) == "image_too_large"
    assert refusal_of(encode(PICTURE, "GIF"), limits=LIMITS.resolve(max_side=23)) == "image_too_large"
    assert refusal_of(encode(PICTURE, "WEBP"), limits=LIMITS.resolve(max_pixels=383)) == "image_too_large"
    with pytest.raises(PayloadTooLarge):
        decode(encode(PICTURE, "PNG"), SAFE, LIMITS.resolve(max_file_bytes=50))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 8192), (8192, 1), (2, 3)])
def test_odd_shapes(width: int, height: int, safe: ImagePolicy) -> None:
    for data in (png_file(np.full((height, width, 3), 7, np.uint8)), encode(photo(width, height), "JPEG")):
        prepared = prepare(data, policy=safe, limits=LIMITS, param="p")
        assert (prepared.identity.width, prepared.identity.height) == (width, height)
        assert len(prepared.square) == 3 * 32 * 32


def test_headers_that_contradict_each_other() -> None:
    """The size that was checked must be the size that is decoded."""
    data = bytearray(encode(PICTURE.convert("RGBA"), "WEBP", exif=exif_block(1)))
    assert data[12:16] == b"VP8X"
    data[24] += 1
    assert refusal_of(bytes(data)) == "image_parse_error"


def test_a_gif_that_reads_differently_to_different_readers() -> None:
    """After an empty extension Pillow skips one more block, behind which it finds another, larger frame."""
    small, large = (b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) for side in (1, 9000))
    hidden = small + bytes(1 + ord(",") - len(small)) + b"\0" + large
    data = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"!\x01\0" + hidden + b"\2\2\x4c\x01\0;"
    assert Image.open(io.BytesIO(data)).size == (9000, 9000)
    with pytest.raises(ImageError, match="contradict"):
        decode(data, SAFE, LIMITS)


def test_a_bomb_for_pillow_is_too_large_for_us() -> None:
    """Should an operator allow more than Pillow itself takes, its refusal comes out as ours."""
    open_limits = LIMITS.resolve(max_side=100_000, max_pixels=10**10)
    frame = struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\2\0;"
    assert refusal_of(b"GIF89a" + frame, limits=open_limits) == "image_too_large"


def test_no_memory_left_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(transform, "_DECODERS", dict.fromkeys(transform._DECODERS, starve))
    assert refusal_of(png_file(RGB)) == "image_too_large"


def test_an_old_pillow_is_not_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_pillow()
    monkeypatch.setattr("PIL.__version__", "12.2.0")
    with pytest.raises(StartupError):
        check_pillow()


# -- damage -------------------------------------------------------------------------------------------

SMALL = photo(16, 12)
WHOLE = {
    "jpeg": encode(SMALL, "JPEG"),
    "jpeg_progressive": encode(SMALL, "JPEG", progressive=True),
    "png": encode(SMALL, "PNG"),
    "webp": encode(SMALL, "WEBP"),
    "webp_lossless": encode(SMALL, "WEBP", lossless=True),
    "gif": encode(SMALL.convert("L"), "GIF"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_cut_file_is_never_half_a_picture(name: str) -> None:
    """Row I02, at every length: an error, or (a GIF without its last mark) the whole picture."""
    data = WHOLE[name]
    whole = decoded(data)
    for length in range(12, len(data)):
        try:
            cut = decoded(data[:length])
        except ImageError as refusal:
            assert refusal.code == "image_parse_error"  # noqa: PT017
        else:
            assert name == "gif"
            assert length >= len(data) - 2
            assert np.array_equal(cut, whole)


@pytest.mark.parametrize("interlace", [False, True])
def test_a_png_that_stops_early_in_good_order(interlace: bool) -> None:
    """Pillow alone leaves the missing rows black and says nothing."""
    short = png_file(RGB[:15], interlace=interlace, missing_bytes=5 * (1 + 3 * 24))
    Image.open(io.BytesIO(short)).load()
    for handling in InputHandling:
        assert refusal_of(short, handling) == "image_parse_error"


JPEGS = {
    "baseline": {},
    "sharp": {"quality": 100, "subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2},
    "rgb": {"keep_rgb": True},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_ends_early_in_good_order(name: str, mode: str) -> None:
    """Cut anywhere, and told to end there: Pillow alone makes the rest grey and says nothing."""
    data = encode(photo(40, 40).convert(mode), "JPEG", **JPEGS[name])
    whole = decoded(data)
    scan = next(segment for segment in jpeg.segments(data) if segment.marker == 0xDA)
    for length in range(scan.start + 20, scan.end):
        try:
            cut = decoded(data[:length].rstrip(b"\xff") + b"\xff\xd9")
        except ImageError as refusal:
            assert refusal.code == "image_parse_error"  # noqa: PT017
        else:  # finer detail may be gone, or the last block be off
            assert name == "progressive" or (cut != whole).any(axis=-1).sum() <= 18 * 18
            assert not set(cut[-1, -1].tolist()) <= {127, 128}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_claims_more_rows_than_it_has(name: str) -> None:
    data = bytearray(encode(PICTURE, "JPEG", **JPEGS[name]))
    height = jpeg_height_at(data)
    data[height : height + 2] = struct.pack(">H", 160)
    assert refusal_of(bytes(data)) == "image_parse_error"


def jpeg_height_at(data: bytearray) -> int:
    frame = next(segment for segment in jpeg.segments(bytes(data)) if segment.marker in (0xC0, 0xC1, 0xC2))
    return frame.body + 1


@pytest.mark.parametrize("grey", [127, 128])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_may_be_grey(name: str, mode: str, grey: int) -> None:
    image = Image.new(mode, (50, 30), (grey,) * len(mode))
    assert decoded(encode(image, "JPEG", **JPEGS[name])).std() == 0


def test_a_png_may_end_in_black() -> None:
    black = np.zeros((16, 24, 4), np.uint8)
    assert (decoded(png_file(black, colour=6), ORIGINAL) == 0).all()


def test_a_wrong_checksum_inside_the_stream() -> None:
    raw = b"".join(b"\0" + row.tobytes() for row in RGB)
    body = zlib.compress(raw)[:-1] + b"?"
    assert refusal_of(png_header(24, 16) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")) == "image_parse_error"


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    name=st.sampled_from(sorted(WHOLE)),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=4),
    handling=st.sampled_from(InputHandling),
)
def test_flipped_bits_give_a_picture_or_an_error(
    name: str, flips: list[tuple[int, int]], handling: InputHandling
) -> None:
    data = bytearray(WHOLE[name])
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    try:
        picture = decoded(bytes(data), handling)
    except ImageError as refusal:
        assert refusal.code in IMAGE_CODES  # noqa: PT017
        return
    except PayloadTooLarge:
        return
    if name == "png":  # everything that matters is under checksums
        assert np.array_equal(picture, decoded(WHOLE[name], handling))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(WHOLE)), at=st.integers(0), piece=st.binary(max_size=30), drop=st.integers(0, 30))
def test_replaced_pieces_give_a_picture_or_an_error(name: str, at: int, piece: bytes, drop: int) -> None:
    data = WHOLE[name]
    at %= len(data)
    try:
        decoded(data[:at] + piece + data[at + drop :])
    except ImageError as refusal:
        assert refusal.code in IMAGE_CODES  # noqa: PT017


# -- which decoders run -------------------------------------------------------------------------------

SPY = """
import sys
import omnilmm.image.transform as transform
from omnilmm.config import ImageLimits, InputHandling
from omnilmm.errors import ImageError
from PIL import Image

def forbidden(*_, **__):
    raise AssertionError("the registry of decoders was asked")

Image.open = Image.init = Image.preinit = forbidden
for line in sys.stdin:
    try:
        transform.decode(bytes.fromhex(line), InputHandling.SAFE, ImageLimits())
        print("ok")
    except ImageError as error:
        print(error.code)
plugins = {name for name in sys.modules if name.startswith("PIL.") and name.endswith("ImagePlugin")}
print(sorted(plugins))
"""


def test_no_other_decoder_is_even_loaded() -> None:
    """Row I15: whatever comes, Pillow's other plugins are not imported, so they cannot run."""
    mpo = encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
    foreign = [encode(PICTURE, kind) for kind in ("TIFF", "JPEG2000", "AVIF", "BMP", "ICO", "DDS", "EPS", "PDF")]
    whole = [*WHOLE.values(), encode(PICTURE, "JPEG", exif=b"Exif\0\0" + exif_block(6)), mpo]
    lines = "\n".join(data.hex() for data in [*foreign, *whole])
    done = subprocess.run([sys.executable, "-c", SPY], input=lines, capture_output=True, text=True, check=True)
    *outcomes, plugins = done.stdout.splitlines()
    assert outcomes == ["unsupported_image_media_type"] * len(foreign) + ["ok"] * len(whole)
    assert plugins == str(["PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.WebPImagePlugin"])
