"""PNG files at the level of their chunks (W3C PNG, third edition): size, and pixels without metadata."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from omnilmm.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 65_536
_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_CHANNELS: Mapping[int, int] = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, dx, dy
_INFLATE_STEP = 1 << 20


class Header(NamedTuple):
    """The contents of IHDR."""

    width: int
    height: int
    bit_depth: int
    colour_type: int
    compression: int
    filter: int
    interlace: int


class Chunk(NamedTuple):
    """`data[start:end]` is the whole chunk with its length, type and CRC; `data[body:end - 4]` its contents."""

    kind: bytes
    start: int
    body: int
    end: int


def header(data: bytes) -> Header:
    """IHDR, which must come first. Its checksum is left to `bare`: caps are checked before anything else.

    Raises:
        ImageError: image_parse_error.
    """
    if len(data) < 29 or data[8:16] != b"\0\0\0\x0dIHDR":
        raise _broken()
    return Header(*struct.unpack_from(">IIBBBBB", data, 16))


def size(data: bytes) -> tuple[int, int]:
    """Width and height.

    Raises:
        ImageError: image_parse_error.
    """
    return header(data)[:2]


def chunks(data: bytes) -> Iterator[Chunk]:
    """Every chunk up to IEND; what follows is not looked at.

    Raises:
        ImageError: image_parse_error: the file ends before IEND does, or there are too many chunks.
    """
    start = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if start + 12 > len(data):
            raise _broken()
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            raise _broken()
        yield Chunk(kind, start, start + 8, end)
        if kind == b"IEND":
            return
        start = end
    raise _broken()


def bare(data: bytes) -> tuple[bytes, bytes]:
    """The file with nothing left in it but what the pixels need, and the EXIF block (b"" if there is none).

    Texts, profiles and the further frames of an animation are gone, so no decoder inflates them.

    Raises:
        ImageError: image_parse_error: cut short, a checksum is wrong, or a chunk we must not ignore is unknown.
    """
    view = memoryview(data)
    pieces = [view[: len(SIGNATURE)]]
    exif = b""
    for kind, start, body, end in chunks(data):
        if kind in _KEPT:
            if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise _broken()
            pieces.append(view[start:end])
        elif kind == b"eXIf":
            exif = exif or data[body : end - 4]
        elif not kind[0] & 0x20:  # an upper-case first letter: critical
            raise _broken()
    return b"".join(pieces), exif


def is_complete(data: bytes) -> bool:
    """Whether the compressed stream holds every row. A decoder leaves rows that are not there at zero.

    Inflates in steps of 1 MiB and keeps nothing.
    """
    missing = _raw_bytes(header(data))
    inflate = zlib.decompressobj()
    try:
        for kind, _, body, end in chunks(data):
            rest = data[body : end - 4] if kind == b"IDAT" else b""
            while rest and missing > 0:
                missing -= len(inflate.decompress(rest, _INFLATE_STEP))
                rest = inflate.unconsumed_tail
    except zlib.error:
        return False
    return missing <= 0


def _raw_bytes(head: Header) -> int:
    """Bytes of the filtered rows of all passes: each row has a filter byte and is padded to whole bytes."""
    bits = head.bit_depth * _CHANNELS.get(head.colour_type, 1)
    passes = _ADAM7 if head.interlace else ((0, 0, 1, 1),)
    total = 0
    for x, y, dx, dy in passes:
        columns, rows = -(-(head.width - x) // dx), -(-(head.height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _broken() -> ImageError:
    return ImageError("The PNG file is damaged or cut short.", code="image_parse_error")
