"""One file and a few short fields out of a multipart/form-data body (RFC 7578), as they stream in.

python-multipart does the parsing. The file's bytes go to their place as they come: nothing is held, nothing is written
twice. Everything is bounded: fields, their lengths, headers, and what stands outside of parts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from omnilmm.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 8
MAX_FIELD_BYTES = 1024
MAX_HEADERS = 8
MAX_HEADER_BYTES = 4096
MAX_AROUND_BYTES = 64 * 1024
"""What a body may hold beside the file's bytes."""


@dataclass(slots=True)
class Form:
    """What was received: text fields by name, and the name of the file; None as long as there was none."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    has_file: bool = False


async def receive_form(
    content_type: str | None,
    body: AsyncIterator[bytes],
    *,
    write: Callable[[bytes], None],
    max_field_bytes: int = MAX_FIELD_BYTES,
) -> Form:
    """Read a form with one file, called `file`, whose bytes are handed to `write`.

    Raises:
        UnsupportedMediaType: the body is no form.
        InvalidRequest: the form is malformed, cut off, or has parts that do not belong there.
        PayloadTooLarge: too much beside the file; and what `write` raises.
    """
    media_type, options = parse_options_header(content_type or "")
    if media_type != b"multipart/form-data":
        raise UnsupportedMediaType("The Content-Type of this endpoint is multipart/form-data.")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 200:
        raise InvalidRequest("The form has no boundary.", code="invalid_form")
    reading = _Reading(write, max_field_bytes)
    try:
        parser = MultipartParser(boundary, reading.callbacks(), max_size=float("inf"))
        num_bytes = 0
        async for piece in body:
            num_bytes += len(piece)
            parser.write(piece)
            if num_bytes - reading.num_file_bytes > MAX_AROUND_BYTES + len(piece):
                raise PayloadTooLarge("The form holds too much beside the file.", code="request_too_large")
        parser.finalize()
    except (FormParserError, ValueError):
        raise InvalidRequest("The body is not a well-formed form.", code="invalid_form") from None
    if not reading.is_complete:
        raise InvalidRequest("The form ends before its last boundary.", code="invalid_form")
    if not reading.form.has_file:
        raise InvalidRequest("'file' is required.", param="file", code="missing_required_parameter")
    return reading.form


class _Reading:
    """Follows the parser from part to part."""

    def __init__(self, write: Callable[[bytes], None], max_field_bytes: int) -> None:
        self.form = Form()
        self.num_file_bytes = 0
        self.is_complete = False
        self._write = write
        self._max_field_bytes = max_field_bytes
        self._num_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = b"", b""
        self._num_header_bytes = 0
        self._field: str | None = None  # the text field whose value is coming; None while it is the file's
        self._value = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._take_header_name,
            "on_header_value": self._take_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open_part,
            "on_part_data": self._take_data,
            "on_part_end": self._end_part,
            "on_end": self._complete,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise InvalidRequest(f"The form has more than {MAX_FIELDS} parts.", code="array_above_max_length")
        self._headers, self._num_header_bytes = {}, 0
        self._value = bytearray()

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES or len(self._headers) > MAX_HEADERS:
            raise InvalidRequest("The headers of a part of the form are too long.", code="invalid_form")

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _open_part(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = _text(options.get(b"name", b""))
        if kind != b"form-data" or not name:
            raise InvalidRequest("A part of the form has no name.", code="invalid_form")
        if name == "file":
            if self.form.has_file:
                raise InvalidRequest("'file' is given twice.", param="file")
            self.form.has_file, self._field = True, None
            filename = options.get(b"filename")
            self.form.filename = None if filename is None else _text(filename)
        elif b"filename" in options:
            raise InvalidRequest("The form has a file that does not belong there.", code="unknown_parameter")
        elif name in self.form.fields:
            raise InvalidRequest("The form gives a field twice.")
        else:
            self._field = name

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._write(data[start:end])
            self.num_file_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > self._max_field_bytes:
            raise InvalidRequest("A field of the form is too long.", code="string_above_max_length")

    def _end_part(self) -> None:
        if self._field is not None:
            self.form.fields[self._field] = _text(bytes(self._value))

    def _complete(self) -> None:
        self.is_complete = True


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("The form's names and fields must be UTF-8.", code="invalid_form") from None
