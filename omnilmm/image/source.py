"""From what a client sent to the bytes of a file we are willing to decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, InvalidRequest, PayloadTooLarge
from omnilmm.image.data_uri import read_data_uri
from omnilmm.image.headers import Size, picture_size, sniff

__all__ = [
    "check_picture",
    "check_request_pixels",
    "located",
    "picture_size",
    "read_data_uri",
    "read_image_url",
    "sniff",
]


def read_image_url(url: str, *, param: str, limits: ImageLimits) -> bytes:
    """The file an image_url points to, by its scheme. Only data: URIs lead anywhere.

    Raises:
        ImageError: invalid_image_url; what `read_data_uri` raises.
        PayloadTooLarge: the file is over its cap.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return read_data_uri(url, param=param, limits=limits)
    if scheme in ("http", "https"):
        message = "Remote URLs are switched off on this server; send the picture as a data: URI."
    else:
        message = "A picture must be given as data:image/<type>;base64,<data>."
    raise ImageError(message, param=param, code="invalid_image_url")


def check_picture(data: bytes, limits: ImageLimits) -> Size:
    """Width and height of a file that may be decoded. Reads the header and no pixel.

    Raises:
        ImageError: what `picture_size` raises; image_too_small where a side is 0; image_too_large over
            `max_side` or `max_pixels`.
        PayloadTooLarge: image_file_too_large, over `max_file_bytes`.
    """
    if len(data) > limits.max_file_bytes:
        raise PayloadTooLarge(f"The picture file is over {limits.max_file_bytes} bytes.", code="image_file_too_large")
    width, height = picture_size(data)
    if width == 0 or height == 0:
        raise ImageError("The picture has no pixels.", code="image_too_small")
    if max(width, height) > limits.max_side:
        raise ImageError(f"A side of the picture is over {limits.max_side} pixels.", code="image_too_large")
    if width * height > limits.max_pixels:
        raise ImageError(f"The picture has more than {limits.max_pixels} pixels.", code="image_too_large")
    return width, height


def check_request_pixels(sizes: Sequence[Size], limits: ImageLimits, *, param: str | None = None) -> None:
    """Refuses a request whose pictures together are too much, however small each of them is.

    Raises:
        ImageError: image_too_large.
    """
    if sum(width * height for width, height in sizes) > limits.max_request_pixels:
        raise ImageError(
            f"The pictures of one request may have {limits.max_request_pixels} pixels together.",
            param=param,
            code="image_too_large",
        )


@contextmanager
def located(param: str) -> Iterator[None]:
    """Tells the errors raised inside which field of the request they are about."""
    try:
        yield
    except InvalidRequest as error:
        error.param = param
        raise
