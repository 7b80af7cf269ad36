"""Builders of picture files, whole and broken, for the tests of this room."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def photo(width: int, height: int) -> Image.Image:
    """A smooth RGB picture without any symmetry, the same every time."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 128 + 100 * np.sin(x / 9 + y / 5)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8), "RGB")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, bits: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return PNG_SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))


def png_file(
    samples: np.ndarray,
    *,
    bits: int = 8,
    colour: int = 2,
    before: Sequence[tuple[bytes, bytes]] = (),
    interlace: bool = False,
    missing_bytes: int = 0,
) -> bytes:
    """A PNG file from `samples` (height, width, channels) at their own depth; `before` are chunks put before IDAT.

    `missing_bytes` are left out at the end of the rows; the compressed stream itself is well formed.
    """
    height, width, _ = samples.shape
    passes = ADAM7 if interlace else ((0, 0, 1, 1),)
    raw = b"".join(_png_row(row, bits) for x, y, dx, dy in passes for row in samples[y::dy, x::dx] if row.shape[0] > 0)
    body = zlib.compress(raw[: len(raw) - missing_bytes])
    return b"".join(
        [
            png_header(width, height, bits, colour, int(interlace)),
            *(png_chunk(kind, contents) for kind, contents in before),
            png_chunk(b"IDAT", body),
            png_chunk(b"IEND", b""),
        ]
    )


def _png_row(row: np.ndarray, bits: int) -> bytes:
    """One filter byte (none) and the packed samples of a row (width, channels)."""
    flat = row.reshape(-1)
    if bits == 16:
        return b"\0" + flat.astype(">u2").tobytes()
    if bits == 8:
        return b"\0" + flat.astype(np.uint8).tobytes()
    digits = (flat[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return b"\0" + np.packbits(digits.astype(np.uint8).reshape(-1)).tobytes()


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_with(data: bytes, *extra: bytes) -> bytes:
    """A JPEG file with more segments right after its start."""
    return data[:2] + b"".join(extra) + data[2:]


def exif_block(orientation: int, order: str = "<") -> bytes:
    """A TIFF structure with nothing but the orientation tag."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What each EXIF orientation asks of the stored pixels (height, width, 3)."""
