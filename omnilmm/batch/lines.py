"""The lines of a batch's input file, as OpenAI's batches have them:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "...", ...}}

Rules that are ours to choose:

- The file is UTF-8, a byte order mark at its beginning is ignored. Lines end with LF or CRLF, the last one need not.
  Lines of white space alone are skipped, but they count for the numbering, which starts at 1.
- What can be told from the line itself is a fault of the file, and a file with faults is not begun: not strict JSON or
  too long (`invalid_json_line`), not an object with exactly these four members (`invalid_type`,
  `missing_required_parameter`, `unknown_parameter`), a `custom_id` that is used twice (`duplicate_custom_id`), empty,
  longer than 512 characters or with control characters, a method other than POST (`invalid_value`), another url than
  the batch's endpoint (`url_mismatch`), another model than the first line's (`model_mismatch`).
- No line at all is `empty_file`, more than 50,000 are `too_many_tasks`.
- Everything else about the body is the line's own affair: it is judged when its turn comes, as a request over HTTP
  would be, and what is wrong goes to the error file. `stream` cannot be true there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from omnilmm.api.strict_json import MAX_BODY_BYTES, parse_json
from omnilmm.batch.order import Place, place_of
from omnilmm.batch.states import LineError
from omnilmm.errors import InvalidRequest, OmniError

MAX_CUSTOM_ID_CHARS = 512
MEMBERS = ("custom_id", "method", "url", "body")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LineRules:
    """What a file must keep to. `max_line_bytes` bounds what is held in memory of it."""

    endpoint: str
    max_lines: int = 50_000
    max_line_bytes: int = MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class Line:
    """A good line: its number, where its JSON stands in the file, its name, its model, and where in the order it
    belongs."""

    number: int
    offset: int
    length: int
    custom_id: str
    model: str
    place: Place


class _Fault(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def scan(file: BinaryIO, rules: LineRules) -> Iterator[Line | LineError]:
    """Every line of the file, good or bad, in order. Holds one line at a time in memory, and all custom ids.

    After `too_many_tasks` nothing more is read.
    """
    seen: dict[str, int] = {}
    model: str | None = None
    number = num_lines = 0
    for number, offset, raw in _raw_lines(file, rules.max_line_bytes):
        if raw is not None and not raw.strip():
            continue
        num_lines += 1
        if num_lines > rules.max_lines:
            yield LineError("too_many_tasks", f"A batch has at most {rules.max_lines} lines.", number)
            return
        try:
            line = _read(number, offset, raw, rules)
            if line.custom_id in seen:
                raise _Fault(
                    "duplicate_custom_id", f"The custom_id of line {seen[line.custom_id]} is used again.", "custom_id"
                )
            seen[line.custom_id] = number
            model = model or line.model
            if line.model != model:
                raise _Fault("model_mismatch", "All lines of a batch ask the same model.", "body.model")
        except _Fault as fault:
            yield LineError(fault.code, fault.message, number, fault.param)
        else:
            yield line
    if not num_lines:
        yield LineError("empty_file", "The file has no lines.")


def read_body(file: BinaryIO, line: Line) -> dict[str, Any]:
    """The body of a good line, read again from the file it was found in.

    Raises:
        InvalidRequest: the body asks for a stream.
    """
    file.seek(line.offset)
    return body_of(file.read(line.length))


def body_of(raw: bytes) -> dict[str, Any]:
    """The body of a good line.

    Raises:
        InvalidRequest: the body asks for a stream.
    """
    body = parse_json(raw)["body"]
    assert isinstance(body, dict)
    if body.get("stream"):
        raise InvalidRequest("A line of a batch cannot be streamed.", param="stream", code="unsupported_value")
    return body


def _raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(number, offset, bytes without the end of line); None for bytes where a line is too long."""
    number, offset = 0, 0
    while raw := file.readline(max_bytes + 2):
        number += 1
        begin, end = offset, offset + len(raw)
        if not raw.endswith(b"\n"):
            while len(raw) > max_bytes and (more := file.readline(SKIP_BYTES)):
                end += len(more)
                if more.endswith(b"\n"):
                    break
        skipped = len(BYTE_ORDER_MARK) if number == 1 and raw.startswith(BYTE_ORDER_MARK) else 0
        line = raw[skipped:].rstrip(b"\r\n")
        yield number, begin + skipped, line if len(line) <= max_bytes else None
        offset = end


def _read(number: int, offset: int, raw: bytes | None, rules: LineRules) -> Line:
    if raw is None:
        raise _Fault("invalid_json_line", f"The line is longer than {rules.max_line_bytes} bytes.")
    try:
        document = parse_json(raw)
    except OmniError:
        raise _Fault("invalid_json_line", "The line is not a JSON object in UTF-8.") from None
    _check_members(document)
    custom_id, method, url, body = (document[member] for member in MEMBERS)
    _check_custom_id(custom_id)
    if method != "POST":
        raise _Fault("invalid_value", "The method of a line is POST.", "method")
    if url != rules.endpoint:
        raise _Fault("url_mismatch", "The url of a line is the endpoint of its batch.", "url")
    if not isinstance(body, dict):
        raise _Fault("invalid_type", "The body of a line is an object.", "body")
    if "model" not in body:
        raise _Fault("missing_required_parameter", "The body names no model.", "body.model")
    model = body["model"]
    if not isinstance(model, str) or not 1 <= len(model) <= 256:
        raise _Fault("invalid_type", "The model is named by a string.", "body.model")
    return Line(number, offset, len(raw), str(custom_id), model, place_of(body))


def _check_members(document: Mapping[str, object]) -> None:
    for member in MEMBERS:
        if member not in document:
            raise _Fault("missing_required_parameter", f"The line has no {member}.", member)
    if len(document) > len(MEMBERS):
        raise _Fault("unknown_parameter", f"A line has the members {', '.join(MEMBERS)} and no other.")


def _check_custom_id(custom_id: object) -> None:
    if not isinstance(custom_id, str):
        raise _Fault("invalid_type", "A custom_id is a string.", "custom_id")
    if not custom_id:
        raise _Fault("string_below_min_length", "A custom_id has at least one character.", "custom_id")
    if len(custom_id) > MAX_CUSTOM_ID_CHARS:
        raise _Fault(
            "string_above_max_length", f"A custom_id has at most {MAX_CUSTOM_ID_CHARS} characters.", "custom_id"
        )
    if any(ord(character) < 32 or ord(character) == 127 for character in custom_id):
        raise _Fault("invalid_value", "A custom_id has no control characters.", "custom_id")
