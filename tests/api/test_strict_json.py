"""Strict JSON: rows P10, P11, T02 and the NaN cases of P01 and P02."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnilmm.api.strict_json import (
    MAX_BODY_BYTES,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_MARKS,
    MAX_MEMBERS,
    parse_json,
    require_json,
)
from omnilmm.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType


def refused(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body)
    return caught.value


def cpu_ms(body: bytes) -> float:
    """Least of five, so that a busy machine does not matter."""
    times = []
    for _ in range(5):
        begun = time.thread_time()
        with suppress(InvalidRequest):
            parse_json(body)
        times.append(time.thread_time() - begun)
    return min(times) * 1000


# -- what is JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (b"{}", {}),
        (b' {"a" : [1, -2.5e3, "x", true, false, null]}\r\n\t', {"a": [1, -2500.0, "x", True, False, None]}),
        ('{"😀": "引\u2028"}'.encode(), {"😀": "引\u2028"}),
        (rb'{"a":"\ud83d\ude00\u0000\"\\\/\b\f\n\r\t"}', {"a": '😀\x00"\\/\b\f\n\r\t'}),
        (rb'{"a\"b":{"c\\":"\\\""}}', {'a"b': {"c\\": '\\"'}}),
        (b'{"a":"[[[[{{{{,,,,::::"}', {"a": "[[[[{{{{,,,,::::"}),
        (b'{"a":"' + b'\\"' * 5000 + b'","b":"' + b"[" * 5000 + b'"}', {"a": '"' * 5000, "b": "[" * 5000}),
        (b'{"a":"' + b"x" * 2000 + b'\\"' + b"[" * 50 + b':"}', {"a": "x" * 2000 + '"' + "[" * 50 + ":"}),
        (b'{"a":"' + b"x" * 2000 + b'\\\\","b":"' + b"[" * 50 + b':"}', {"a": "x" * 2000 + "\\", "b": "[" * 50 + ":"}),
        (b'{"a":' + str(MAX_INTEGER).encode() + b',"b":-' + str(MAX_INTEGER).encode() + b"}", None),
        (b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", None),
    ],
)
def test_json_is_read(body, document):
    assert parse_json(body) == (json.loads(body) if document is None else document)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n",
        b"null",
        b"[]",
        b"3",
        b'"{}"',
        b"true",
        b"{",
        b"}",
        b'{"a":1}x',
        b'{"a":1}{}',
        b"{}\x00",
        b"\x0b{}",
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":[1,]}',
        b'{"a" 1}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":1.}',
        b'{"a":tru}',
        b'{"a":"\n"}',
        rb'{"a":"\x41"}',
        rb'{"a":"\u12"}',
        b'{"a":"',
        b'{"a":"\\',
        b'{"a":"\\"',
        b'{"a":1}//',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',  # a surrogate, spelled in UTF-8
        b'{"a":"\xc0\x80"}',  # an overlong NUL
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-32-be"),
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":1,"a":1}',
        rb'{"a":1,"\u0061":2}',
        b'{"b":[{"c":{"a":1,"a":2}}]}',
        b"{" * 33,
        b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b"[" * 1_000 + b"]" * 1_000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'[{"a":' * 100_000 + b"1" + b"}]" * 100_000,
        b'"' * 1_000_000,
        b'{"a":NaNa}',
        b'{"a":nan}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_strict_json_is_refused_cheaply(body):
    error = refused(body)
    assert (error.status, error.code, error.param) == (400, "invalid_json", None)
    assert cpu_ms(body) < 20


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"temperature":NaN}', "temperature"),
        (b'{"a":[0,{"n":-Infinity}]}', "a[1].n"),
        (b'{"n":Infinity}', "n"),
        (b'{"t":1e999}', "t"),
        (b'{"t":-1e999}', "t"),
        (b'{"seed":' + b"9" * 21 + b"}", "seed"),
        (b'{"seed":-' + b"9" * 21 + b"}", "seed"),
        (rb'{"messages":[{"content":"\ud800"}]}', "messages[0].content"),
        (rb'{"a":1,"stop":["x","\udc00 "]}', "stop[1]"),
        (rb'{"a":"\ud800A"}', "a"),
        (rb'{"metadata":{"\uDBFF":"x"}}', "metadata"),
        (rb'{"\ud800":1}', None),
    ],
)
def test_values_without_a_meaning_are_named(body, param):
    error = refused(body)
    assert (error.code, error.param) == ("invalid_value", param)


def test_a_fault_in_the_grammar_beside_nan_is_still_a_fault_in_the_grammar():
    assert refused(b'{"a":NaN,}').code == "invalid_json"
    assert refused(b'{"a":"NaN",}').code == "invalid_json"
    assert refused(b'{"a":"NaN","b":"\xff"}').code == "invalid_json"


# -- how much -----------------------------------------------------------------------------------------


def test_a_body_over_the_cap_is_not_read():
    with pytest.raises(PayloadTooLarge):
        parse_json(b" " * (MAX_BODY_BYTES + 1))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (
            b'{"messages":[' + b'{"role":"user","content":"a"},' * 1_000_000 + b"1]}",
            "array_above_max_length",
            "messages",
        ),
        (b'{"model":"m","stop":[' + b"[]," * 10_000_000 + b"[]]}", "array_above_max_length", "stop"),
        (b'{"a":[' + b"0," * 15_000_000 + b"0]}", "array_above_max_length", "a"),
        (b'{"a":[' + b'"",' * 10_000_000 + b'""]}', "array_above_max_length", "a"),
        (
            b'{"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}}",
            "object_above_max_properties",
            "logit_bias",
        ),
        (b'{"a":"' + b"x" * 100_000 + b'","b":[' + b"0," * MAX_MARKS + b"0]}", "array_above_max_length", None),
    ],
    ids=["messages", "arrays", "numbers", "strings", "members", "behind a long string"],
)
def test_a_crowd_is_refused_before_it_is_built(body, code, param):
    error = refused(body)
    assert (error.code, error.param) == (code, param)
    tracemalloc.start()
    refused(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert cpu_ms(body) < 200


def test_an_object_has_a_widest_size():
    document = {"x": {str(i): 1 for i in range(MAX_MEMBERS)}}
    assert parse_json(json.dumps(document).encode()) == document
    document["x"]["one more"] = 1
    error = refused(json.dumps(document).encode())
    assert (error.code, error.param) == ("object_above_max_properties", "x")


def test_as_many_values_as_allowed_are_read():
    document = {"x": [0] * (MAX_MARKS - 4)}  # two braces, two brackets, a colon: one comma fewer than numbers
    assert parse_json(json.dumps(document).encode()) == document
    document["x"].append(0)
    assert refused(json.dumps(document).encode()).code == "array_above_max_length"


def test_a_heavy_picture_is_read_at_the_speed_of_memory(heavy_body):
    assert parse_json(heavy_body) == json.loads(heavy_body)
    assert cpu_ms(heavy_body) < 100
    tracemalloc.start()
    parse_json(heavy_body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 22 * 2**20  # the string itself and little else


# -- against the standard library ---------------------------------------------------------------------

text = st.text(max_size=20)
numbers = st.one_of(
    st.integers(-(10**22), 10**22), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([MAX_INTEGER, 0])
)
awkward = [
    '"',
    "\\",
    '\\"',
    "\ud7ff",
    "NaN",
    "]}",
    "x" * 1023,
    "x" * 1024,
    '"' * 63,
    '"' * 65,
    "\\" * 70,
    "é" * 3000,
    "x" * 2000 + '"[{:',
]
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text, st.sampled_from(awkward)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=20,
)
bodies = st.builds(
    lambda document, ascii_only, indent: json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode(),
    st.dictionaries(text, values, max_size=5),
    st.booleans(),
    st.sampled_from([None, 1]),
)
fragments = st.sampled_from(
    [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"NaN", b"1e999", b"-", b"\xff", b"\x00", b"\\ud800"]
)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError
    return dict(pairs)


def _sound(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_sound(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(_sound, value))
    if isinstance(value, str):
        return value.isascii() or value.encode("utf-8", "ignore").decode() == value
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) <= MAX_INTEGER


def strict_by_standard_library(body: bytes) -> dict[str, Any] | None:
    """The same rules said another way; None is a refusal."""
    try:
        document = json.loads(body.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and _sound(document) else None


def check_against_standard_library(body: bytes) -> None:
    expected = strict_by_standard_library(body)
    if expected is None:
        assert refused(body).code in ("invalid_json", "invalid_value")
    else:
        assert repr(parse_json(body)) == repr(expected)


@given(bodies)
@settings(max_examples=300, deadline=None)
def test_documents_are_read_as_the_standard_library_reads_them(body):
    check_against_standard_library(body)


@given(bodies, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), fragments), min_size=1, max_size=4))
@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_documents_are_refused_or_read_alike(body, damages):
    for place, num_removed, fragment in damages:
        at = place % (len(body) + 1)
        body = body[:at] + fragment + body[at + num_removed :]
    check_against_standard_library(body)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused_or_read_alike(body):
    check_against_standard_library(body)


# -- headers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON ; charset=UTF-8", 'application/json; charset="utf-8"']
)
@pytest.mark.parametrize("content_encoding", [None, "identity", ""])
def test_plain_json_is_taken(content_type, content_encoding):
    require_json(content_type, content_encoding)


@pytest.mark.parametrize(
    ("content_type", "content_encoding"),
    [
        (None, None),
        ("", None),
        ("text/plain", None),
        ("application/jsonx", None),
        ("application/x-www-form-urlencoded", None),
        ("multipart/form-data; boundary=application/json", None),
        ("application/json; charset=utf-16", None),
        ("application/json, text/plain", None),
        ("application/json", "gzip"),
        ("application/json", "identity, br"),
    ],
)
def test_anything_else_is_415(content_type, content_encoding):
    with pytest.raises(UnsupportedMediaType) as caught:
        require_json(content_type, content_encoding)
    assert caught.value.status == 415
