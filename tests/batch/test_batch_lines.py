"""Which files a batch takes: the rows B01 to B05 of the catalogue of bad inputs."""

import io
import json
import tracemalloc

import pytest
from batch_fakes import ENDPOINT, jsonl, line

from omnilmm.batch.lines import Line, LineRules, read_body, scan
from omnilmm.batch.states import LineError
from omnilmm.errors import InvalidRequest

GOOD = jsonl(line("a"), line("b"))


def faults(content: bytes, **rules):
    return [
        (entry.code, entry.line, entry.param)
        for entry in scan(io.BytesIO(content), LineRules(ENDPOINT, **rules))
        if isinstance(entry, LineError)
    ]


def good(content: bytes):
    return [entry.custom_id for entry in scan(io.BytesIO(content), LineRules(ENDPOINT)) if isinstance(entry, Line)]


def without(member):
    entry = line("c")
    del entry[member]
    return entry


def body(**changes):
    return line("c")["body"] | changes


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", [("empty_file", None, None)]),
        (b"\n\r\n  \n", [("empty_file", None, None)]),
        (GOOD + b"{\n", [("invalid_json_line", 3, None)]),
        (GOOD + b"[1]\n", [("invalid_json_line", 3, None)]),
        (GOOD + b'{"a": NaN}\n', [("invalid_json_line", 3, None)]),
        (GOOD + b'{"a": 1, "a": 2}\n', [("invalid_json_line", 3, None)]),
        (GOOD + b"\xff\n", [("invalid_json_line", 3, None)]),
        (GOOD + jsonl(line("c", "x" * 5000)), [("invalid_json_line", 3, None)]),  # the cap is 4096 here
        (GOOD + jsonl(line("a")), [("duplicate_custom_id", 3, "custom_id")]),
        (GOOD + jsonl(without("custom_id")), [("missing_required_parameter", 3, "custom_id")]),
        (GOOD + jsonl(line(7)), [("invalid_type", 3, "custom_id")]),
        (GOOD + jsonl(line("")), [("string_below_min_length", 3, "custom_id")]),
        (GOOD + jsonl(line("x" * 600)), [("string_above_max_length", 3, "custom_id")]),
        (GOOD + jsonl(line("a\0b")), [("invalid_value", 3, "custom_id")]),
        (GOOD + jsonl(line("c", method="GET")), [("invalid_value", 3, "method")]),
        (GOOD + jsonl(without("method")), [("missing_required_parameter", 3, "method")]),
        (GOOD + jsonl(line("c", url="/v1/completions")), [("url_mismatch", 3, "url")]),
        (GOOD + jsonl(line("c", body=[])), [("invalid_type", 3, "body")]),
        (GOOD + jsonl(line("c", body={})), [("missing_required_parameter", 3, "body.model")]),
        (GOOD + jsonl(line("c", body=body(model=1))), [("invalid_type", 3, "body.model")]),
        (GOOD + jsonl(line("c", body=body(model="n"))), [("model_mismatch", 3, "body.model")]),
        (GOOD + jsonl(line("c", extra=1)), [("unknown_parameter", 3, None)]),
        (GOOD + jsonl(line("c"), line("d")), [("too_many_tasks", 4, None)]),  # the cap is 3 here
        (b"{\n" + GOOD + b"{\n", [("invalid_json_line", 1, None), ("invalid_json_line", 4, None)]),
    ],
)
def test_what_is_wrong_is_told_with_its_line(content, wanted):
    assert faults(content, max_line_bytes=4096, max_lines=3 if wanted[0][0] == "too_many_tasks" else 100) == wanted


def test_utf_16_is_not_json():
    assert {code for code, _, _ in faults(GOOD.decode().encode("utf-16"))} == {"invalid_json_line"}


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + GOOD,
        GOOD.rstrip(b"\n"),
        GOOD + b"\n \n",
        GOOD.replace(b"\n", b"\n\n"),
    ],
    ids=["plain", "crlf", "mark", "no last newline", "blank lines after", "blank lines between"],
)
def test_ways_to_write_lines_that_are_accepted(content):
    assert good(content) == ["a", "b"]
    file = io.BytesIO(content)
    for entry in scan(io.BytesIO(content), LineRules(ENDPOINT)):
        assert read_body(file, entry)["model"] == "m"


def test_numbers_count_skipped_lines_too():
    assert [entry.number for entry in scan(io.BytesIO(b"\n" + GOOD), LineRules(ENDPOINT))] == [2, 3]


def test_a_stream_is_refused_when_the_lines_turn_comes():
    content = jsonl(line("a", body=body(stream=True)))
    (entry,) = scan(io.BytesIO(content), LineRules(ENDPOINT))
    with pytest.raises(InvalidRequest) as caught:
        read_body(io.BytesIO(content), entry)
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "stream")


class Endless(io.RawIOBase):
    """A file of so many equal pieces, made as it is read."""

    def __init__(self, piece: bytes, num: int) -> None:
        self._piece, self._left, self._rest = piece, num, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self._rest and self._left:
            self._left -= 1
            self._rest = self._piece
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


@pytest.mark.parametrize(
    ("piece", "num", "wanted"),
    [(b"x" * 65536, 800, "invalid_json_line"), (b"\n" * 65536, 3, "empty_file")],
    ids=["one line of 50 MB", "200,000 blank lines"],
)
def test_memory_does_not_grow_with_the_file(piece, num, wanted):
    tracemalloc.start()
    try:
        file = io.BufferedReader(Endless(piece, num))
        entries = list(scan(file, LineRules(ENDPOINT, max_line_bytes=1 << 20)))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert [entry.code for entry in entries] == [wanted]


def test_a_million_lines_are_not_read_to_the_end():
    file = io.BufferedReader(Endless(b"{}\n", 1_000_000))
    entries = list(scan(file, LineRules(ENDPOINT, max_lines=50)))
    assert entries[-1].code == "too_many_tasks"
    assert json.loads(file.readline()) == {}  # there was more
