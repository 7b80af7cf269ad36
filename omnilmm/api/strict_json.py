"""Bytes of a request body to a dict: RFC 8259 and nothing looser.

The body is UTF-8 without a byte order mark, holds one object, and no object in it names a member twice. NaN and
Infinity are not numbers; a number must be finite as a double and an integer has at most 20 digits; a string is
whole Unicode, without half a surrogate pair. Depth, and how many values there are, are limited before anything is
built, so that the cost of a refusal does not depend on what the body would have become.

`pydantic_core.from_json` does the parsing: unlike the standard library it reads UTF-8 where it lies (a 20 MB data
URI beside one emoji is not widened to 80 MB of UCS-4) and it refuses half surrogates. What it lets through
(duplicates, 1e999, long integers) is checked here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import NoReturn

from pydantic_core import from_json

from omnilmm.api.params import Path, spell
from omnilmm.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_DEPTH = 32
MAX_MARKS = 100_000
"""Brackets, commas and colons outside strings: a bound on the number of values in a body."""
MAX_MEMBERS = 1024
"""Members of one object: no object of the API is wider."""
MAX_INTEGER = 10**20 - 1

_NOT_MARKS = bytes(byte for byte in range(256) if byte not in b"[]{},:")
_OPENING, _CLOSING = frozenset(b"[{"), frozenset(b"]}")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SHORT_STRING = re.compile(rb'"[^"\\]{0,1023}+(?:\\.[^"\\]{0,1023}+){0,63}+"', re.DOTALL)
_STRETCH = re.compile(rb'(?:[^"]{1,1024}+|%s){1,1024}+' % _SHORT_STRING.pattern, re.DOTALL)
_PYTHON_READS = (b"NaN", b"Infinity", rb"\ud", rb"\uD")
_SURROGATE = re.compile("[\ud800-\udfff]")


def require_json(content_type: str | None, content_encoding: str | None) -> None:
    """Check the two headers that say what the body is.

    Raises:
        UnsupportedMediaType: not ``application/json``, a charset other than UTF-8, or a compressed body.
    """
    media_type, *parameters = (content_type or "").split(";")
    if media_type.strip().lower() != "application/json":
        raise UnsupportedMediaType("The Content-Type of this endpoint is application/json.")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("The body must be UTF-8.")
    if (content_encoding or "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("The body must not be compressed.")


def parse_json(body: bytes) -> dict[str, object]:
    """The object in the body. Arrays are lists, numbers int or float, in the order of the document.

    Raises:
        PayloadTooLarge: more than MAX_BODY_BYTES.
        InvalidRequest: `invalid_json` for what is not strict JSON; `invalid_value`, with the path as `param`, for
            a number or string that JSON can spell (or nearly, as NaN) but that has no meaning here;
            `array_above_max_length` or `object_above_max_properties` for too many values.
    """
    if len(body) > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
    num_members = _check_structure(body)
    try:
        document = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError:
        _explain(body)
    if not isinstance(document, dict):
        raise _invalid_json("The body must be a JSON object.")
    if _check_values(document) != num_members:
        raise _invalid_json("The body names a member of an object twice.")
    return document


def _check_structure(body: bytes) -> int:
    """One pass over the bytes before anything is built: depth and number of values. Returns the number of colons.

    It goes in stretches of many short strings, taken out by one substitution, and jumps over long strings with
    `bytes.find`. On a malformed body the answer means nothing, but it is right for everything up to the fault, and
    the parser stops there.
    """
    at = depth = num_marks = num_strings = num_colons = 0
    while at < len(body):
        stretch = _STRETCH.match(body, at)
        if stretch is None:
            at = _end_of_string(body, at)
            num_strings += 1
        else:
            outside, num_short = _SHORT_STRING.subn(b"", stretch[0])
            marks = outside.translate(None, _NOT_MARKS)
            depth = _check_depth(marks, depth)
            at = stretch.end()
            num_strings += num_short
            num_marks += len(marks)
            num_colons += marks.count(b":")
        if num_marks > MAX_MARKS:
            _refuse_crowd(body)
        if num_strings > MAX_MARKS + 1:  # more strings than marks that could stand between them
            raise _invalid_json("The body is not valid JSON in UTF-8.")
    return num_colons


def _check_depth(marks: bytes, depth: int) -> int:
    for mark in marks:
        if mark in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise _invalid_json(f"The body is nested more than {MAX_DEPTH} levels deep.")
        elif mark in _CLOSING:
            depth -= 1
    return depth


def _end_of_string(body: bytes, opening: int) -> int:
    """The index after the quote that closes the string opened at `opening`; the end of the body if none does."""
    closing = body.find(b'"', opening + 1)
    if closing < 0:
        return len(body)
    if body[closing - 1] != ord("\\"):
        return closing + 1
    match = _STRING.match(body, opening)  # perhaps an escaped quote: read the escapes in order
    return match.end() if match else len(body)


def _check_values(document: dict[str, object]) -> int:
    """Look at every value once. Returns the number of members of all objects."""
    num_members = 0
    waiting: list[object] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            num_members += len(value)
            if len(value) > MAX_MEMBERS:
                _refuse_first_bad_value(document)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif not isinstance(value, str) and _fault(value) is not None:
            _refuse_first_bad_value(document)
    return num_members


def _fault(value: object) -> tuple[str, str] | None:
    """Why this one value is refused, as (code, words), or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return "invalid_value", "must be a finite number"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "invalid_value", "has more than 20 digits"
    if isinstance(value, str) and _SURROGATE.search(value):
        return "invalid_value", "holds half of a surrogate pair, which is not a character"
    if isinstance(value, dict):
        if len(value) > MAX_MEMBERS:
            return "object_above_max_properties", f"has more than {MAX_MEMBERS} members"
        if any(_SURROGATE.search(name) for name in value):
            return "invalid_value", "has a member whose name holds half of a surrogate pair"
    return None


def _refuse_first_bad_value(document: object) -> None:
    for path, value in _walk(document, ()):
        fault = _fault(value)
        if fault is not None:
            code, words = fault
            param = spell(path)
            raise InvalidRequest(f"{f'{param!r}' if param else 'The body'} {words}.", param=param, code=code)


def _walk(value: object, path: Path) -> Iterator[tuple[Path, object]]:
    """Every value with its path, in the order of the document."""
    yield path, value
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _walk(child, (*path, name))
    elif isinstance(value, list):
        for position, child in enumerate(value):
            yield from _walk(child, (*path, position))


def _explain(body: bytes) -> NoReturn:
    """Refuse a body the parser did not take, naming the value where there is one to name.

    The standard library reads NaN, Infinity and half surrogates. If it reads the body, one of them was the fault.
    """
    if any(spelling in body for spelling in _PYTHON_READS):
        try:
            document = json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError):
            pass
        else:
            _refuse_first_bad_value(document)
    raise _invalid_json("The body is not valid JSON in UTF-8.")


def _refuse_crowd(body: bytes) -> NoReturn:
    """Refuse a body of too many values, naming the largest member its first 64 KiB show."""
    try:
        beginning = from_json(body[: 1 << 16], allow_partial=True, cache_strings="none")
    except ValueError:
        beginning = None
    crowds = {
        name: value
        for name, value in (beginning.items() if isinstance(beginning, dict) else ())
        if isinstance(value, (list, dict))
    }
    name = max(crowds, key=lambda name: len(crowds[name]), default=None)
    param = spell((name,)) if name is not None else None
    is_object = name is not None and isinstance(crowds[name], dict)
    code = "object_above_max_properties" if is_object else "array_above_max_length"
    raise InvalidRequest(f"{f'{param!r}' if param else 'The body'} holds too many values.", param=param, code=code)


def _invalid_json(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_json")
