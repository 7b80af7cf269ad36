"""Pictures inside a data: URI, by a written grammar and with strict base64."""

from __future__ import annotations

import binascii
import re

from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, PayloadTooLarge

_SCHEME = "data:"
_MAX_HEADER_CHARS = 512
_WHITE_SPACE = b" \t\n\f\r"
_NAME = r"[A-Za-z0-9!#$&^_.+-]+"
_MEDIA_TYPE = re.compile(rf"{_NAME}/{_NAME}")
_PARAMETERS = re.compile(rf"(?:{_NAME}=[A-Za-z0-9!#$&^_.+%-]*;)*base64", re.IGNORECASE)


def read_data_uri(url: str, *, param: str, limits: ImageLimits) -> bytes:
    """The bytes a data: URI holds, a subset of RFC 2397.

        uri       = "data:" media-type *( ";" token "=" value ) ";base64" "," payload
        media-type= "image/" token                       ; any but image/svg+xml
        token     = 1*( ALPHA / DIGIT / any of !#$&^_.+- )
        value     = *( token characters / "%" )          ; not quoted
        payload   = base64 of RFC 4648 section 4, padded ; white space anywhere in it is skipped

    Names are case-insensitive; what stands before the payload takes at most 512 characters. Parameters such as
    ``charset=utf-8`` or ``name=cat.png`` are allowed and mean nothing. The media type only has to name a picture:
    which one it is, the bytes tell. The URL-safe alphabet, percent-encoding and missing padding are refused,
    because lenient decoders turn them into other bytes without a word.

    White space may add up to a sixteenth to the payload, which is ample for lines of 76 characters.

    Args:
        param: path of the field, for the error.

    Raises:
        ImageError: invalid_image_url (not this grammar), unsupported_image_media_type (a media type that is no
            picture of ours), invalid_base64_image, empty_image_file (the payload is empty).
        PayloadTooLarge: image_file_too_large, found before anything is decoded.
    """
    comma = url.find(",", 0, len(_SCHEME) + _MAX_HEADER_CHARS)
    if url[: len(_SCHEME)].lower() != _SCHEME or comma < 0:
        raise ImageError(
            "A picture must be given as data:image/<type>;base64,<data>.", param=param, code="invalid_image_url"
        )
    _check_header(url[len(_SCHEME) : comma], param)
    max_chars = 4 * -(-limits.max_file_bytes // 3)
    if len(url) - comma - 1 > max_chars + max_chars // 16:
        raise _too_large(param, limits)
    data = _decode(url[comma + 1 :], param, limits)
    if not data:
        raise ImageError("The picture file is empty.", param=param, code="empty_image_file")
    return data


def _check_header(header: str, param: str) -> None:
    media_type, _, parameters = header.partition(";")
    if media_type and not _MEDIA_TYPE.fullmatch(media_type):
        raise ImageError("The media type of the data: URI is malformed.", param=param, code="invalid_image_url")
    # No media type at all means text/plain (RFC 2397, section 2).
    name = media_type.lower()
    if not name.startswith("image/") or name == "image/svg+xml":
        raise ImageError(
            "Only pictures can be sent here: image/jpeg, image/png, image/webp or image/gif.",
            param=param,
            code="unsupported_image_media_type",
        )
    if not _PARAMETERS.fullmatch(parameters):
        raise ImageError(
            "The data: URI must say ;base64 right before the comma.", param=param, code="invalid_image_url"
        )


def _decode(payload: str, param: str, limits: ImageLimits) -> bytes:
    """Strict base64; a few passes in C over the whole payload and no loop here."""
    bad = ImageError(
        "The picture is not valid base64 (standard alphabet, with padding).", param=param, code="invalid_base64_image"
    )
    try:
        encoded = payload.encode("ascii").translate(None, _WHITE_SPACE)
    except UnicodeEncodeError:
        raise bad from None
    padding = len(encoded) - len(encoded.rstrip(b"="))
    # a2b_base64 takes excess padding after a whole group even in its strict mode.
    if len(encoded) % 4 or padding > 2:
        raise bad
    if len(encoded) // 4 * 3 - padding > limits.max_file_bytes:
        raise _too_large(param, limits)
    try:
        return binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error:
        raise bad from None


def _too_large(param: str, limits: ImageLimits) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The picture file is over {limits.max_file_bytes} bytes.", param=param, code="image_file_too_large"
    )
