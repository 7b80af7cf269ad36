"""Server-sent events: what we write is what a reader of the standard reads, however the bytes are cut."""

from __future__ import annotations

import json

import pytest
from fuzzing import FUZZ
from hypothesis import given
from hypothesis import strategies as st

from omnilmm.api.completion_responses import CompletionRendering
from omnilmm.api.rendering import ChatRendering
from omnilmm.api.response_objects import Echo, ResponseRendering
from omnilmm.api.responses import Heading
from omnilmm.api.sse import DONE, DONE_DATA, Event, EventReader, encode_error, encode_event
from omnilmm.errors import NotFound, OmniError, Overloaded
from omnilmm.messages import Delta, FinishReason, Usage


def read(stream: bytes, size: int | None = None) -> list[Event]:
    reader = EventReader()
    step = size or len(stream) or 1
    return [event for at in range(0, len(stream), step) for event in reader.feed(stream[at : at + step])]


def test_an_event_is_one_line_of_compact_json():
    assert encode_event({"a": "引😀", "b": [1, None]}) == 'data: {"a":"引😀","b":[1,null]}\n\n'.encode()


def test_line_ends_in_the_text_do_not_end_the_line():
    text = "a\nb\rc\r\nd\u2028e\u2029f\x85g\x00\x1b\x0c"
    event = encode_event({"text": text})
    assert event.count(b"\n") == 2
    assert b"\r" not in event
    assert json.loads(read(event)[0].data) == {"text": text}


def test_a_named_event_has_its_name_in_front():
    assert encode_event({"a": 1}, name="response.created") == b'event: response.created\ndata: {"a":1}\n\n'


def test_half_a_surrogate_pair_is_escaped():
    event = encode_event("a\ud800b")
    assert event == b'data: "a\\ud800b"\n\n'
    assert json.loads(event[6:]) == "a\ud800b"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_spell_is_not_sent(number):
    with pytest.raises(ValueError, match="JSON"):
        encode_event({"logprob": number})


def test_an_error_event_has_the_body_of_the_error():
    error = Overloaded("Busy.", retry_after=1)
    assert [json.loads(event.data) for event in read(encode_error(error))] == [error.body()]
    assert json.loads(read(encode_error(NotFound("No.", param="model")))[0].data)["error"]["param"] == "model"
    assert b"secret" not in encode_error(OmniError("secret"))


def test_done_is_an_event_of_its_own():
    assert read(DONE) == [Event(DONE_DATA)]


# -- the reader, by the standard ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"", []),
        (b"data: a\n\n", [Event("a")]),
        (b"data:a\n\ndata: b\n\n", [Event("a"), Event("b")]),
        (b"data:  a \n\n", [Event(" a ")]),
        (b"data: a\ndata:\ndata: b\n\n", [Event("a\n\nb")]),
        (b"data\n\n", [Event("")]),
        (b"data:\n\n\n\n", [Event("")]),
        (b": a comment\n\ndata: a\n:\n\n", [Event("a")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [Event("a", "error"), Event("b")]),
        (b"event: error\n\ndata: b\n\n", [Event("b")]),
        (b"id: 7\nretry: 10\nfoo: bar\ndata: a:b\n\n", [Event("a:b")]),
        (b"data: a\n\ndata: never ended\n", [Event("a")]),
        (b"data: a\n\ndata: nev", [Event("a")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [Event("a")]),
        ("data: 引😀\n\n".encode(), [Event("引😀")]),
        (b"data: \xff\n\n", [Event("\ufffd")]),
    ],
)
def test_streams_are_read_by_the_standard(stream, events, line_end, size):
    assert read(stream.replace(b"\n", line_end), size) == events


def test_feeding_nothing_changes_nothing():
    reader = EventReader()
    assert reader.feed(b"data: a\r") == []
    assert reader.feed(b"") == []
    assert reader.feed(b"\n\r") == [Event("a")]
    assert reader.feed(b"\ndata: b\n\n") == [Event("b")]


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 100, b"data: " + b"x" * 100 + b"\n", b"data: xxxxxxxx\n" * 20])
def test_an_event_without_end_is_given_up(stream):
    reader = EventReader(max_event_bytes=64)
    with pytest.raises(ValueError, match="64"):
        any(reader.feed(stream[at : at + 16]) for at in range(0, len(stream), 16))


def test_many_small_events_are_no_large_one():
    reader = EventReader(max_event_bytes=64)
    assert len(reader.feed(b"data: 0123456789\n\n" * 1000)) == 1000


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)


@FUZZ
@given(st.lists(json_values, max_size=8), st.integers(1, 40), st.sampled_from([b"\n", b"\r", b"\r\n"]))
def test_round_trip(values, size, line_end):
    stream = b"".join(encode_event(value) for value in values) + DONE
    *events, done = read(stream.replace(b"\n", line_end), size)
    assert [json.loads(event.data) for event in events] == values
    assert done.data == DONE_DATA


words = st.lists(
    st.text(max_size=12) | st.sampled_from(["\r\n\r\n", "data: x", "[DONE]", "\u2028", "\x00", ":", "event: error\n"]),
    max_size=6,
)


@FUZZ
@given(words, st.integers(1, 60), st.sampled_from(["chat", "completions", "responses"]))
def test_whatever_is_said_arrives_as_it_was_said(texts, size, route):
    """The writers of all three routes, read by the standard however the bytes are cut."""
    heading = Heading("r", "m", 7)
    rendering = {
        "chat": ChatRendering(heading, 1, True),
        "completions": CompletionRendering(heading, True),
        "responses": ResponseRendering(heading, Echo()),
    }[route]
    told = [*rendering.begin()]
    for text in texts:
        told += rendering.delta(0, Delta(text))
    told += [*rendering.finish(0, FinishReason.STOP), *rendering.end(Usage(1, 1, 0, 0))]
    events = read(b"".join(told), size)
    assert len(events) == len(told)
    assert [event.data for event in events].count(DONE_DATA) == (route != "responses")
    documents = [json.loads(event.data) for event in events if event.data != DONE_DATA]
    if route == "chat":
        said = [c["delta"].get("content") or "" for d in documents for c in d["choices"]]
    elif route == "completions":
        said = [c["text"] for d in documents for c in d["choices"]]
    else:
        said = [d["delta"] for d in documents if d["type"] == "response.output_text.delta"]
        assert documents[-1]["response"]["output"][0]["content"][0]["text"] == "".join(texts)
        assert [event.name for event in events] == [d["type"] for d in documents]
    assert "".join(said) == "".join(texts)
