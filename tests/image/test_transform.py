"""Decoding pictures that are in order: the table of modes, SAFE against ORIGINAL, orientation, identity."""

from __future__ import annotations

import hashlib
import io
import struct

import numpy as np
import pytest
from picture_files import (
    TURNS,
    encode,
    exif_block,
    jpeg_segment,
    jpeg_with,
    photo,
    png_file,
)
from PIL import Image

from omnilmm.config import ImageLimits, ImagePolicy, InputHandling
from omnilmm.errors import ImageError
from omnilmm.image.transform import decode, identity, normalise, prepare, squash

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
