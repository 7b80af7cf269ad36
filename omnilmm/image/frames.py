"""The frames that pass between the decode pool and its child processes.

A frame is a fixed head (magic, length of the fields, length of the payload), the fields as a JSON object, and
the payload as raw bytes. Nothing in it can be executed.

    request   {"side", "mean", "std", "handling"}                the file
    answer    {"digest", "width", "height"}                      the square, uint8 (side, side, 3)
    refusal   {"code", "message"}                                -
    greeting  {}  once, when the child is ready                  -
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from omnilmm.config import ImagePolicy, InputHandling
from omnilmm.errors import IMAGE_CODES, InvalidRequest
from omnilmm.messages import PixelIdentity, PreparedImage

_HEAD = struct.Struct("<4sIQ")
HEAD_BYTES = _HEAD.size
_MAGIC = b"OLI1"
_MAX_FIELDS_BYTES = 4096


class BadFrame(Exception):
    """The other side does not keep to the format and must not be talked to any more."""


def pack(fields: Mapping[str, Any], payload_bytes: int) -> bytes:
    """Head and fields of a frame; the caller sends the payload after them."""
    text = json.dumps(fields).encode()
    return _HEAD.pack(_MAGIC, len(text), payload_bytes) + text


def unpack_head(head: bytes) -> tuple[int, int]:
    """Lengths of the fields and of the payload that follow.

    Raises:
        BadFrame
    """
    magic, fields_bytes, payload_bytes = _HEAD.unpack(head)
    if magic != _MAGIC or fields_bytes > _MAX_FIELDS_BYTES:
        raise BadFrame
    return fields_bytes, payload_bytes


def unpack_fields(text: bytes) -> dict[str, Any]:
    """Raises BadFrame where the fields are no JSON object."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise BadFrame from None
    if not isinstance(fields, dict):
        raise BadFrame
    return fields


def request_fields(policy: ImagePolicy) -> dict[str, Any]:
    return {"side": policy.side, "mean": policy.mean, "std": policy.std, "handling": policy.handling}


def policy_of(fields: Mapping[str, Any]) -> ImagePolicy:
    return ImagePolicy(
        side=fields["side"],
        mean=tuple(fields["mean"]),
        std=tuple(fields["std"]),
        handling=InputHandling(fields["handling"]),
    )


def answer_fields(identity: PixelIdentity) -> dict[str, Any]:
    return {"digest": identity.digest.hex(), "width": identity.width, "height": identity.height}


def refusal_fields(error: InvalidRequest) -> dict[str, Any]:
    return {"code": error.code, "message": error.message}


def refusal_of(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Code and message if the frame is a refusal.

    Raises:
        BadFrame: the code is not one of ours.
    """
    if "code" not in fields:
        return None
    code, message = fields["code"], fields.get("message")
    if not isinstance(code, str) or code not in IMAGE_CODES or not isinstance(message, str):
        raise BadFrame
    return code, message


def picture_of(
    fields: Mapping[str, Any], square: bytes, *, side: int, sizes: frozenset[tuple[int, int]]
) -> PreparedImage:
    """The picture in an answer, whose (width, height) must be among `sizes`.

    Raises:
        BadFrame
    """
    try:
        identity = PixelIdentity(bytes.fromhex(fields["digest"]), fields["width"], fields["height"])
        known = (identity.width, identity.height) in sizes
    except (KeyError, TypeError, ValueError):
        raise BadFrame from None
    if not known or len(identity.digest) != 32 or len(square) != 3 * side * side:
        raise BadFrame
    return PreparedImage(identity, side, square)
