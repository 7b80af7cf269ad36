"""The catalogue's pictures (rows I, D and U): a reference as a client would send it, and the answer it must get."""

from __future__ import annotations

import base64
import gzip
import io
import struct
import zipfile
import zlib

from PIL import Image


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _black_png(width: int, height: int) -> bytes:
    """A whole grey PNG of any size, compressed row by row."""
    squeeze = zlib.compressobj(1)
    body = b"".join(squeeze.compress(bytes(width + 1)) for _ in range(height)) + squeeze.flush()
    header = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return header + _png_chunk(b"IDAT", body) + _png_chunk(b"IEND", b"")


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64," + base64.b64encode(data).decode()


_PHOTO = Image.linear_gradient("L").convert("RGB").resize((48, 40))
_PNG, _JPEG = _encode(_PHOTO, "PNG"), _encode(_PHOTO, "JPEG", quality=90)
_WEBP, _GIF = _encode(_PHOTO, "WEBP"), _encode(_PHOTO, "GIF")
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'

OK = (200, None)
EMPTY = (400, "empty_image_file")
BROKEN = (400, "image_parse_error")
UNKNOWN = (400, "invalid_image_format")
LARGE = (400, "image_too_large")
SMALL = (400, "image_too_small")
FOREIGN = (400, "unsupported_image_media_type")
BASE64 = (400, "invalid_base64_image")
URL = (400, "invalid_image_url")

PICTURES: tuple[tuple[str, str, tuple[int, str | None]], ...] = (
    ("I01-nothing", uri(b""), EMPTY),
    ("I01-magic", uri(b"\x89PNG\r\n\x1a\n"), BROKEN),
    *((f"I02-png-{cut}", uri(_PNG[: len(_PNG) * cut // 100]), BROKEN) for cut in (10, 50, 90)),
    *((f"I02-jpeg-{cut}", uri(_JPEG[: len(_JPEG) * cut // 100]), BROKEN) for cut in (10, 50, 90)),
    *((f"I02-webp-{cut}", uri(_WEBP[: len(_WEBP) * cut // 100]), BROKEN) for cut in (50, 90)),
    ("I02-flip", uri(_PNG[:60] + bytes([_PNG[60] ^ 0xFF]) + _PNG[61:]), BROKEN),
    ("I03-random", uri(bytes(range(255, 0, -1))), UNKNOWN),
    ("I03-html", uri(b"<html><body>hello</body></html>"), UNKNOWN),
    ("I03-zip", uri(_zip()), UNKNOWN),
    ("I03-elf", uri(b"\x7fELF\2\1\1" + bytes(57)), UNKNOWN),
    ("I03-gzip", uri(gzip.compress(_PNG)), UNKNOWN),
    ("I04", uri(_png_header(50_000, 50_000) + _png_chunk(b"IDAT", b"")), LARGE),
    ("I05", uri(_black_png(13_000, 1_000)), LARGE),
    ("I07", uri(_PNG[:33] + _png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))) + _PNG[33:]), OK),
    ("I10", uri(_encode(_PHOTO, "GIF", save_all=True, append_images=[Image.new("RGB", (48, 40))] * 3)), OK),
    ("I11-cmyk", uri(_encode(_PHOTO.convert("CMYK"), "JPEG")), OK),
    ("I11-palette", uri(_encode(_PHOTO.convert("P"), "PNG")), OK),
    ("I11-bits", uri(_encode(_PHOTO.convert("1"), "PNG")), OK),
    ("I12", uri(_encode(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG")), OK),
    ("I13-dot", uri(_encode(Image.new("RGB", (1, 1)), "PNG")), OK),
    ("I13-flat", uri(_png_header(10_000, 1)), LARGE),
    ("I13-none", uri(_png_header(0, 5)), SMALL),
    ("I15-tiff", uri(_encode(_PHOTO, "TIFF")), FOREIGN),
    ("I15-bmp", uri(_encode(_PHOTO, "BMP")), FOREIGN),
    ("I15-ico", uri(_encode(_PHOTO, "ICO", sizes=[(16, 16)])), FOREIGN),
    ("I15-pdf", uri(b"%PDF-1.7\n"), FOREIGN),
    ("I15-jp2", uri(b"\0\0\0\x0cjP  \r\n\x87\n"), FOREIGN),
    ("I15-heic", uri(b"\0\0\0\x18ftypheic" + bytes(16)), FOREIGN),
    ("I15-psd", uri(b"8BPS\0\1" + bytes(20)), FOREIGN),
    ("I16", uri(_SVG), FOREIGN),
    ("I17", uri(_GIF + _zip()), OK),
    ("I18-jpeg", uri(_JPEG, "image/png"), OK),
    ("I18-html", uri(_JPEG, "text/html"), FOREIGN),
    ("D01", uri(_PNG)[:40] + "\r\n \t" + uri(_PNG)[40:], OK),
    ("D02-url-safe", "data:image/png;base64,_-_-", BASE64),
    ("D02-junk", "data:image/png;base64,@@@@", BASE64),
    ("D02-inner", "data:image/png;base64,AAAA=AAAA", BASE64),
    ("D02-short", "data:image/png;base64,AAA", BASE64),
    ("D02-long", "data:image/png;base64,AAAA====", BASE64),
    ("D03-plain", "data:image/png,hello", URL),
    ("D03-comma", "data:image/png;base64", URL),
    ("D03-empty", "data:", URL),
    ("D03-upper", "DATA:IMAGE/PNG;NAME=a.png;BASE64," + uri(_PNG).partition(",")[2], OK),
    ("D04-html", uri(b"<html>", "text/html"), FOREIGN),
    ("D04-svg", uri(_SVG, "image/svg+xml"), FOREIGN),
    ("D04-video", "data:video/jpeg;base64," + ",".join(["AAAA"] * 1000), FOREIGN),
    *(
        (f"U-{i}", url, URL)
        for i, url in enumerate(
            [
                *("http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/"),
                *("http://169.254.169.254/", "https://example.org/cat.png", "file:///etc/passwd", "/etc/passwd"),
                *("ftp://example.org/", "gopher://example.org/", "blob:x", "", "http://127.0.0.1:6666\\@1.1.1.1"),
            ]
        )
    ),
)
"""(row, url, (status, code)). A server of the default settings fetches nothing, so U rows all end the same way."""
