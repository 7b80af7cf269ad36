"""What a file says about itself in its first bytes: which format, how many pixels. Nothing is decoded."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Literal

from omnilmm.errors import ImageError
from omnilmm.image import jpeg, png

Format = Literal["JPEG", "PNG", "WEBP", "GIF"]
Size = tuple[int, int]
"""Width and height in pixels."""

_MAX_GIF_BLOCKS = 8192

_FOREIGN: tuple[tuple[int, bytes], ...] = (
    (0, b"II*\0"),  # TIFF and raw camera files
    (0, b"MM\0*"),
    (0, b"II+\0"),  # BigTIFF
    (0, b"MM\0+"),
    (4, b"ftyp"),  # HEIC, AVIF, and MP4
    (0, b"\0\0\0\x0cjP  "),  # JPEG 2000
    (0, b"\xff\x4f\xff\x51"),
    (0, b"\0\0\0\x0cJXL "),  # JPEG XL
    (0, b"\xff\x0a"),
    (0, b"\0\0\1\0"),  # ICO, CUR, ICNS
    (0, b"\0\0\2\0"),
    (0, b"icns"),
    (0, b"8BPS"),  # PSD
    (0, b"gimp xcf"),
    (0, b"%PDF-"),
    (0, b"%!PS"),  # EPS, also with the DOS header
    (0, b"\xc5\xd0\xd3\xc6"),
    (0, b"SIMPLE  ="),  # FITS
    (0, b"DDS "),
    (0, b"\xd7\xcd\xc6\x9a"),  # WMF and EMF
    (0, b"\1\0\x09\0\0\3"),
    (40, b" EMF"),
    (0, b"\x8aMNG"),
    (0, b"\x8bJNG"),
    (0, b"v/1\1"),  # OpenEXR
    (0, b"#?RADIANCE"),
    (0, b"qoif"),
    (0, b"FLIF"),
    (0, b"BPG\xfb"),
    (8, b"AVI "),
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    *((0, b"P%d\n" % number) for number in range(1, 7)),  # PBM, PGM, PPM
)


def sniff(data: bytes) -> Format:
    """The format by its magic number; what the client declared does not count.

    Raises:
        ImageError: empty_image_file; unsupported_image_media_type for picture formats we know and do not take;
            invalid_image_format for everything else.
    """
    if not data:
        raise ImageError("The picture file is empty.", code="empty_image_file")
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(png.SIGNATURE):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if _is_foreign(data):
        raise ImageError(
            "This kind of picture is not supported; send JPEG, PNG, WebP or GIF.", code="unsupported_image_media_type"
        )
    raise ImageError("The file is not a picture we know; send JPEG, PNG, WebP or GIF.", code="invalid_image_format")


def picture_size(data: bytes) -> Size:
    """Width and height as the header has them, before any rotation. Zeros are possible.

    Of an animation it is the canvas that counts.

    Raises:
        ImageError: as `sniff`; image_parse_error where the header is damaged; what `jpeg.size` raises.
    """
    return _READERS[sniff(data)](data)


def _is_foreign(data: bytes) -> bool:
    if any(data.startswith(magic, offset) for offset, magic in _FOREIGN):
        return True
    if data.startswith(b"BM") and len(data) >= 26 and data[6:10] == b"\0\0\0\0":
        return True
    head = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return head.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and (
        b"<svg" in head or b"<!doctype svg" in head
    )


def _gif_size(data: bytes) -> Size:
    """The screen, enlarged where the first frame reaches beyond it (GIF89a, sections 18 and 20)."""
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        position = 13 + _palette_bytes(flags)
        for _ in range(_MAX_GIF_BLOCKS):
            introducer = data[position]
            if introducer == 0x2C:  # image descriptor
                left, top, columns, rows = struct.unpack_from("<HHHH", data, position + 1)
                return max(width, left + columns), max(height, top + rows)
            if introducer == 0x3B:  # trailer
                break
            if introducer == 0x21:  # extension: a label, then sub-blocks up to an empty one
                position += 2
                while length := data[position]:
                    position += 1 + length
            position += 1
    except (struct.error, IndexError):
        pass
    raise ImageError("The GIF file is damaged or cut short.", code="image_parse_error")


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp_size(data: bytes) -> Size:
    """The canvas of the extended form, else the frame of the only bitstream (RFC 9649, sections 2.5 to 2.7)."""
    broken = ImageError("The WebP file is damaged or cut short.", code="image_parse_error")
    if len(data) < 30 or int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise broken
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise broken


_READERS: Mapping[Format, Callable[[bytes], Size]] = {
    "JPEG": jpeg.size,
    "PNG": png.size,
    "GIF": _gif_size,
    "WEBP": _webp_size,
}
