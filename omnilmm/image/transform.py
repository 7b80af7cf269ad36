"""A file's bytes to canonical pixels, to the square of a vision tower, to the tensor: pure functions.

Two ways of handling (`InputHandling`):

ORIGINAL
    What the original programs do, bit for bit: decode, then Pillow's plain ``convert("RGB")``. Alpha is thrown
    away, EXIF orientation ignored, 16-bit grey clipped at 255.
SAFE
    The picture as people see it: turned upright, transparent parts laid on white, 16-bit values scaled to 8 bits.

Both take the first frame of an animation, drop colour profiles without applying them, and leave CMYK to
Pillow's plain formula. For ordinary RGB pictures they agree.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import PIL
from PIL import Image, ImageChops
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from omnilmm.config import ImageLimits, ImagePolicy, InputHandling
from omnilmm.errors import ImageError, InvalidRequest, StartupError
from omnilmm.image import jpeg, png
from omnilmm.image.headers import Format, sniff
from omnilmm.image.orientation import read_orientation, upright
from omnilmm.image.source import check_picture, located
from omnilmm.messages import PixelIdentity, PreparedImage

if TYPE_CHECKING:
    import numpy as np
    from PIL.ImageFile import ImageFile

_WHITE = (255, 255, 255)
_MIN_PILLOW = 13  # earlier ones have known holes in the JPEG decoder

_DECODERS: Mapping[Format, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
}
"""Named one by one rather than asked of Image.open, whose registry can load every plugin and whose JPEG entry
may hand over to another one."""


def check_pillow() -> None:
    """Refuses versions that must not be fed untrusted files.

    Raises:
        StartupError: the installed Pillow is too old.
    """
    if int(PIL.__version__.split(".")[0]) < _MIN_PILLOW:
        raise StartupError(f"Pillow {_MIN_PILLOW} or newer is needed to decode pictures safely.")


def prepare(data: bytes, *, policy: ImagePolicy, limits: ImageLimits, param: str) -> PreparedImage:
    """Bytes of a file to what travels to the vision pool.

    Raises:
        ImageError: any code of `errors.IMAGE_CODES` but those of URLs; `param` is in it.
        PayloadTooLarge: image_file_too_large.
    """
    with located(param), _failures():
        image = decode(data, policy.handling, limits)
        return PreparedImage(identity(image), policy.side, squash(image, policy.side))


def decode(data: bytes, handling: InputHandling, limits: ImageLimits) -> Image.Image:
    """The canonical picture: mode RGB, 8 bits, (width, height) as SAFE or ORIGINAL handling sees it.

    Raises:
        ImageError: what `check_picture` raises, before any pixel is decoded; image_parse_error; image_too_large
            where memory does not suffice.
        PayloadTooLarge: image_file_too_large.
    """
    with _failures():
        size = check_picture(data, limits)
        kind = sniff(data)
        stripped, exif = _strip(kind, data)
        image = _open(kind, stripped)
        if image.size != size:
            raise ImageError("The picture's headers contradict each other.", code="image_parse_error")
        image.load()
        if not _is_complete(kind, stripped, image):
            raise ImageError("The picture is damaged or cut short.", code="image_parse_error")
        if handling is InputHandling.ORIGINAL:
            # It plays no part in the conversion of pixels, and Pillow warns about some forms of it.
            image.info.pop("transparency", None)
            return image.convert("RGB")
        if kind == "PNG":
            image = _eight_bits(image, png.header(stripped).bit_depth)
        return upright(_on_white(image), read_orientation(exif or image.info.get("exif", b"")))


def identity(image: Image.Image) -> PixelIdentity:
    """SHA-256 over the bytes of an RGB picture, (height, width, 3) in C order; the size stands beside it."""
    return PixelIdentity(hashlib.sha256(image.tobytes()).digest(), image.width, image.height)


def squash(image: Image.Image, side: int) -> bytes:
    """uint8 (side, side, 3) in C order: both sides brought to `side`, whatever the proportions.

    Antialiased bicubic on 8-bit data, as torchvision's resize of a PIL picture does it.
    """
    return image.resize((side, side), Image.Resampling.BICUBIC).tobytes()


def normalise(square: bytes, policy: ImagePolicy) -> np.ndarray:
    """float32 (3, side, side): (x / 255 - mean) / std, in this order and in float32 throughout."""
    import numpy as np

    pixels = np.frombuffer(square, np.uint8).reshape(policy.side, policy.side, 3)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)  # (3, side, side)
    planes /= np.float32(255)
    planes -= np.array(policy.mean, np.float32)[:, None, None]
    planes /= np.array(policy.std, np.float32)[:, None, None]
    return planes


def _strip(kind: Format, data: bytes) -> tuple[bytes, bytes]:
    """The pixels' part of the file, and EXIF where we cut it out ourselves."""
    if kind == "JPEG":
        return jpeg.bare(data)
    if kind == "PNG":
        return png.bare(data)
    return data, b""


def _open(kind: Format, stripped: bytes) -> Image.Image:
    return _DECODERS[kind](io.BytesIO(stripped))


def _is_complete(kind: Format, stripped: bytes, image: Image.Image) -> bool:
    """False where Pillow filled in what the file does not hold, which it does without a word.

    In a PNG the missing rows stay zero: the last one, or any in an interlaced file. In a JPEG the missing blocks
    are mid-grey, and the last one is among them. Only where it looks like that is it found out for certain.
    """
    if kind == "PNG":
        last_row = image.crop((0, image.height - 1, image.width, image.height))
        suspicious = "interlace" in image.info or not any(last_row.tobytes())
        return not suspicious or png.is_complete(stripped)
    if kind == "JPEG":
        last_pixel = image.crop((image.width - 1, image.height - 1, image.width, image.height))
        if set(last_pixel.tobytes()) <= {127, 128}:
            again = _open(kind, jpeg.with_surplus(stripped))
            return ImageChops.difference(image, again).getbbox() is None
    return True


def _eight_bits(image: Image.Image, bit_depth: int) -> Image.Image:
    """A PNG picture with 8-bit samples, and its transparent colour on the same scale.

    The high byte is taken, which is what Pillow does with 16-bit colour by itself.
    """
    transparent = image.info.get("transparency")
    if image.mode == "I;16":
        wide = image.convert("I")
        grey = wide.point([value >> 8 for value in range(1 << 16)], "L")
        if transparent is None:
            return grey
        alpha = wide.point([0 if value == transparent else 255 for value in range(1 << 16)], "L")
        return Image.merge("LA", (grey, alpha))
    if image.mode == "RGB" and transparent is not None:
        image.info["transparency"] = tuple(_eight_bit_sample(value, bit_depth) for value in transparent)
    elif image.mode == "L" and transparent is not None:
        image.info["transparency"] = _eight_bit_sample(transparent, bit_depth)
    return image


def _eight_bit_sample(value: int, bit_depth: int) -> int:
    """A tRNS sample on the 8-bit scale; only its low `bit_depth` bits count (W3C PNG, 11.3.1.1)."""
    value &= (1 << bit_depth) - 1
    return value >> 8 if bit_depth == 16 else value * 255 // ((1 << bit_depth) - 1)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


@contextmanager
def _failures() -> Iterator[None]:
    """Whatever goes wrong in Pillow becomes an error of ours; its own words stay here."""
    try:
        yield
    except InvalidRequest:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise ImageError("The picture needs too much memory to decode.", code="image_too_large") from None
    except Exception:
        raise ImageError("The picture could not be decoded.", code="image_parse_error") from None
