"""Decoding: the table of modes, SAFE against ORIGINAL, and everything a file can do to a decoder."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import (
    TURNS,
    encode,
    exif_block,
    jpeg_segment,
    jpeg_with,
    photo,
    png_chunk,
    png_file,
    png_header,
)
from PIL import Image

from omnilmm.config import ImageLimits, ImagePolicy, InputHandling
from omnilmm.errors import IMAGE_CODES, ImageError, PayloadTooLarge, StartupError
from omnilmm.image import jpeg, transform
from omnilmm.image.transform import check_pillow, decode, identity, normalise, prepare, squash

SAFE, ORIGINAL = InputHandling.SAFE, InputHandling.ORIGINAL
LIMITS = ImageLimits()
PICTURE = photo(24, 16)
RGB = np.asarray(PICTURE)
GREY = np.asarray(PICTURE.convert("L"))[..., None]
ALPHA = np.linspace(0, 255, 24 * 16).astype(np.uint8).reshape(16, 24, 1)


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


def white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What compositing on white gives, in floating point."""
    share = alpha.astype(float) / 255
    return np.broadcast_to(colour * share + 255 * (1 - share), (*colour.shape[:2], 3))


# -- the table of modes -------------------------------------------------------------------------------

PALETTE = bytes(np.random.default_rng(1).integers(0, 256, 48, dtype=np.uint8))
INDICES = (np.arange(24 * 16).reshape(16, 24, 1) % 16).astype(np.uint8)
PALETTE_RGB = np.frombuffer(PALETTE, np.uint8).reshape(16, 3)[INDICES[..., 0]]
WIDE = (np.arange(24 * 16) * 170 + 3).astype(np.uint16).reshape(16, 24, 1)
WIDE_RGB = np.concatenate([WIDE, WIDE[::-1], 65_535 - WIDE], axis=-1)
BITS = (np.arange(24 * 16).reshape(16, 24, 1) // 5 % 2).astype(np.uint8)
KEY = struct.pack(">H", int(WIDE[5, 7, 0]))

MODES: dict[str, tuple[bytes, np.ndarray]] = {
    "1_bit": (png_file(BITS, bits=1, colour=0), white(255 * BITS, 255 * np.ones_like(BITS))),
    "1_bit_tRNS": (png_file(BITS, bits=1, colour=0, before=[(b"tRNS", b"\0\0")]), np.full((16, 24, 3), 255)),
    "2_bit_grey": (png_file(INDICES % 4, bits=2, colour=0), white(85 * (INDICES % 4), 255 + 0 * INDICES)),
    "2_bit_grey_tRNS": (
        png_file(INDICES % 4, bits=2, colour=0, before=[(b"tRNS", b"\0\2")]),
        white(85 * (INDICES % 4), np.where(INDICES % 4 == 2, 0, 255)),
    ),
    "4_bit_grey_tRNS": (  # of the transparent colour only the low 4 bits count
        png_file(INDICES, bits=4, colour=0, before=[(b"tRNS", b"\1\x17")]),
        white(17 * INDICES.astype(int), np.where(INDICES == 7, 0, 255)),
    ),
    "grey": (png_file(GREY, colour=0), white(GREY, 255 + 0 * GREY)),
    "grey_tRNS": (
        png_file(GREY, colour=0, before=[(b"tRNS", b"\0" + bytes([GREY[3, 3, 0]]))]),
        white(GREY, np.where(GREY[3, 3] == GREY, 0, 255)),
    ),
    "16_bit_grey": (png_file(WIDE, bits=16, colour=0), white(WIDE >> 8, 255 + 0 * WIDE)),
    "16_bit_grey_tRNS": (
        png_file(WIDE, bits=16, colour=0, before=[(b"tRNS", KEY)]),
        white(WIDE >> 8, np.where(WIDE[5, 7] == WIDE, 0, 255)),
    ),
    "grey_alpha": (png_file(np.concatenate([GREY, ALPHA], axis=-1), colour=4), white(GREY, ALPHA)),
    "16_bit_grey_alpha": (
        png_file(np.concatenate([WIDE, WIDE[:, ::-1]], axis=-1), bits=16, colour=4),
        white(WIDE >> 8, WIDE[:, ::-1] >> 8),
    ),
    "rgb": (png_file(RGB), RGB),
    "rgb_interlaced": (png_file(RGB, interlace=True), RGB),
    "rgb_tRNS": (
        png_file(RGB, before=[(b"tRNS", struct.pack(">HHH", *RGB[4, 9].tolist()))]),
        white(RGB, np.where((RGB[4, 9] == RGB).all(axis=-1, keepdims=True), 0, 255)),
    ),
    "16_bit_rgb": (png_file(WIDE_RGB, bits=16), WIDE_RGB >> 8),
    "16_bit_rgb_tRNS": (
        png_file(WIDE_RGB, bits=16, before=[(b"tRNS", struct.pack(">HHH", *WIDE_RGB[2, 2].tolist()))]),
        white(WIDE_RGB >> 8, np.where((WIDE_RGB[2, 2] >> 8 == WIDE_RGB >> 8).all(axis=-1, keepdims=True), 0, 255)),
    ),
    "rgb_alpha": (png_file(np.concatenate([RGB, ALPHA], axis=-1), colour=6), white(RGB, ALPHA)),
    "16_bit_rgb_alpha": (
        png_file(np.concatenate([WIDE_RGB, WIDE], axis=-1), bits=16, colour=6),
        white(WIDE_RGB >> 8, WIDE >> 8),
    ),
    "palette": (png_file(INDICES, colour=3, before=[(b"PLTE", PALETTE)]), PALETTE_RGB),
    "palette_4_bit": (png_file(INDICES, bits=4, colour=3, before=[(b"PLTE", PALETTE)]), PALETTE_RGB),
    "palette_tRNS_one": (
        png_file(INDICES, colour=3, before=[(b"PLTE", PALETTE), (b"tRNS", b"\xff\xff\0")]),
        white(PALETTE_RGB, np.where(INDICES == 2, 0, 255)),
    ),
    "palette_tRNS_many": (
        png_file(INDICES, colour=3, before=[(b"PLTE", PALETTE), (b"tRNS", bytes(range(0, 240, 15)))]),
        white(PALETTE_RGB, 15 * INDICES),
    ),
    "webp_alpha": (
        encode(Image.fromarray(np.concatenate([RGB, ALPHA], axis=-1)), "WEBP", lossless=True, exact=True),
        white(RGB, ALPHA),
    ),
    "webp": (encode(PICTURE, "WEBP", lossless=True), RGB),
    "gif": (encode(Image.fromarray(INDICES[..., 0] * 15), "GIF"), white(15 * INDICES, 255 + 0 * INDICES)),
    "gif_transparent": (
        encode(Image.fromarray(INDICES[..., 0] * 15), "GIF", transparency=45),
        white(15 * INDICES, np.where(INDICES == 3, 0, 255)),
    ),
    "jpeg_grey": (encode(PICTURE.convert("L"), "JPEG", quality=100), white(GREY, 255 + 0 * GREY)),
    "jpeg": (encode(PICTURE, "JPEG", quality=100, subsampling=0), RGB),
}


@pytest.mark.parametrize("name", MODES)
def test_safe_handling_shows_what_people_see(name: str) -> None:
    data, expected = MODES[name]
    difference = np.abs(decoded(data).astype(float) - expected)
    if name.startswith("jpeg"):
        assert difference.mean() < 1
    else:
        assert difference.max() <= 1


@pytest.mark.parametrize("name", MODES)
def test_original_handling_is_the_plain_conversion(name: str) -> None:
    data, _ = MODES[name]
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        image.info.pop("transparency", None)  # it takes no part, but Pillow warns about it
        assert np.array_equal(decoded(data, ORIGINAL), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["rgb", "webp", "jpeg", "jpeg_grey", "palette", "grey", "gif", "1_bit"])
def test_both_agree_where_nothing_needs_mending(name: str) -> None:
    assert np.array_equal(decoded(MODES[name][0], SAFE), decoded(MODES[name][0], ORIGINAL))


def test_a_16_bit_ramp_is_scaled_and_not_clipped() -> None:
    ramp = np.arange(65_536).reshape(256, 256, 1)
    data = png_file(ramp, bits=16, colour=0)
    assert np.array_equal(decoded(data), np.broadcast_to(ramp >> 8, (256, 256, 3)))
    assert (decoded(data, ORIGINAL) == 255).mean() > 0.99


def test_what_is_invisible_stays_invisible() -> None:
    red = np.broadcast_to(np.array([255, 0, 0, 0], np.uint8), (4, 4, 4))
    assert (decoded(png_file(red, colour=6)) == 255).all()
    assert (decoded(png_file(red, colour=6), ORIGINAL) == [255, 0, 0]).all()


def cmyk(inks: np.ndarray) -> np.ndarray:
    """RGB of (height, width, 4) inks by the plain formula."""
    inks = inks.astype(float)
    return (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255


def test_cmyk_as_photoshop_writes_it() -> None:
    inks = np.concatenate([RGB, GREY // 3], axis=-1)
    data = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(decoded(data) - cmyk(inks)).mean() < 2


def test_ycck_as_photoshop_writes_it() -> None:
    inks = np.concatenate([RGB, GREY // 3], axis=-1)
    # Adobe stores inverted inks, and of those C, M and Y as if they were R, G and B; Pillow inverts when it writes.
    stored = np.concatenate([255 - np.asarray(PICTURE.convert("YCbCr")), GREY // 3], axis=-1)
    data = bytearray(encode(Image.fromarray(stored, "CMYK"), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    assert np.abs(decoded(bytes(data)) - cmyk(inks)).mean() < 3


# -- orientation and animation ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_equals_the_file_turned_beforehand(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = encode(PICTURE, kind, **options)
    tagged = encode(PICTURE, kind, exif=b"Exif\0\0" + exif_block(orientation, ">"), **options)
    stored = decoded(plain)
    beforehand = png_file(np.ascontiguousarray(TURNS[orientation](stored)))
    assert np.array_equal(decoded(tagged), decoded(beforehand))
    assert np.array_equal(decoded(tagged, ORIGINAL), stored)
    same_key = identity(decode(tagged, SAFE, LIMITS)) == identity(decode(plain, SAFE, LIMITS))
    assert same_key == (orientation == 1)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\x08\0\0\0\xff\xff" + bytes(60_000),
        b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0",  # a directory inside itself
        b"junk",
    ],
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    plain = encode(PICTURE, "JPEG")
    assert np.array_equal(decoded(jpeg_with(plain, jpeg_segment(0xE1, b"Exif\0\0" + exif))), decoded(plain))


def test_profiles_are_dropped() -> None:
    plain = encode(PICTURE, "PNG")
    for profile in (b"junk", bytes(10_000_000)):
        assert np.array_equal(decoded(encode(PICTURE, "PNG", icc_profile=profile)), decoded(plain))
        data = encode(PICTURE, "WEBP", lossless=True, icc_profile=profile)
        assert np.array_equal(decoded(data), decoded(plain))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_only(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), (index % 256, 255 - index % 256, index // 4)) for index in range(1000)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data).astype(int) - [0, 255, 0]).max() <= 8  # lossy WebP is near


def test_polyglots_are_the_picture_they_show() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(PICTURE, kind)
        assert np.array_equal(decoded(data + b"PK\x03\x04<script>alert(1)</script>"), decoded(data))
    script = encode(PICTURE.convert("L"), "GIF", comment=b"*/=1;alert(1)//")
    assert np.array_equal(decoded(script), decoded(encode(PICTURE.convert("L"), "GIF")))


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
    assert refusal_of(MODES["rgb"][0]) == "image_too_large"


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


# -- what comes out -----------------------------------------------------------------------------------


def test_identity_is_the_digest_of_the_pixels() -> None:
    found = identity(PICTURE)
    assert found.digest == hashlib.sha256(RGB.tobytes()).digest()
    assert (found.width, found.height) == (24, 16)


def test_identities_tell_pictures_apart() -> None:
    """Same bytes in another shape, same indices under another palette, same colours under other alpha."""
    tall = np.ascontiguousarray(RGB.reshape(24, 16, 3))
    swapped = PALETTE[3:6] + PALETTE[:3] + PALETTE[6:]
    files = [
        png_file(RGB),
        png_file(tall),
        png_file(INDICES, colour=3, before=[(b"PLTE", PALETTE)]),
        png_file(INDICES, colour=3, before=[(b"PLTE", swapped)]),
        png_file(np.concatenate([RGB, ALPHA], axis=-1), colour=6),
        png_file(np.concatenate([RGB, 255 - ALPHA], axis=-1), colour=6),
    ]
    assert len({identity(decode(data, SAFE, LIMITS)) for data in files}) == len(files)


def test_identities_do_not_depend_on_the_file() -> None:
    same = [png_file(RGB), png_file(RGB, interlace=True), encode(PICTURE, "WEBP", lossless=True)]
    assert len({identity(decode(data, SAFE, LIMITS)) for data in same}) == 1


def test_prepare_names_the_field(safe: ImagePolicy) -> None:
    with pytest.raises(ImageError) as refusal:
        prepare(b"junk", policy=safe, limits=LIMITS, param="messages[1].content[0]")
    assert refusal.value.param == "messages[1].content[0]"
    prepared = prepare(png_file(RGB), policy=safe, limits=LIMITS, param="p")
    assert prepared.identity == identity(PICTURE)
    assert prepared.square == squash(PICTURE, 32)


def test_normalise_by_hand() -> None:
    policy = ImagePolicy(side=2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    tensor = normalise(bytes([0, 0, 0, 255, 255, 255, 51, 102, 204, 0, 0, 255]), policy)
    expected = [[[0, 1], [0.2, 0]], [[-1, 1], [-0.2, -1]], [[-4, 0], [-0.8, 0]]]
    np.testing.assert_allclose(tensor, np.array(expected, np.float32), atol=1e-6)
