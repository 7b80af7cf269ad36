"""Server-sent events, both ways (WHATWG HTML, section 9.2: https://html.spec.whatwg.org/multipage/server-sent-events.html).

A stream of completions is a run of ``data: <JSON>`` events and then ``data: [DONE]``; the events of a response have
names, and the last of them says how it ended. When something goes wrong after the first byte, the status can no longer
tell: an event with the error is sent, and the stream ends without [DONE].
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from omnilmm.errors import OmniError

DONE_DATA = "[DONE]"
DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"

MAX_EVENT_BYTES = 8 * 1024 * 1024

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_event(value: object, *, name: str | None = None) -> bytes:
    """One event with `value` as its JSON, on one line: JSON escapes every character that ends a line of an event.

    Half a surrogate pair, which UTF-8 cannot hold, is written as its JSON escape. `name` is the event's type, a word
    of ours; without one it is a plain message.

    Raises:
        ValueError: a number that is not finite.
        TypeError: not a value JSON knows.
    """
    line = b"" if name is None else f"event: {name}\n".encode("ascii")
    return line + b"data: " + _ENCODER.encode(value).encode("utf-8", "backslashreplace") + b"\n\n"


def encode_error(error: OmniError) -> bytes:
    """The event that tells of a failure in the middle of a stream. Nothing may follow it, DONE neither."""
    return encode_event(error.body())


@dataclass(frozen=True, slots=True)
class Event:
    """A received event: `name` is its type ("message" if it has none), `data` its lines joined by a line feed."""

    data: str
    name: str = "message"


class EventReader:
    """Bytes as they arrive, cut anywhere, to events. Half an event at the end of a stream is no event."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail = bytearray()  # a line that has no end yet
        self._after_cr = False  # a line feed that comes next belongs to the carriage return before it
        self._at_start = True
        self._data: list[str] = []
        self._size = 0
        self._name = ""

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete.

        Raises:
            ValueError: an event is larger than `max_event_bytes`.
        """
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or data.endswith(b"\r")
        events = []
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            event = self._take_line(bytes(self._tail) + line)
            self._tail.clear()
            if event is not None:
                events.append(event)
        self._tail += rest
        self._check_size(len(self._tail))
        return events

    def _take_line(self, line: bytes) -> Event | None:
        """Add one whole line to the event being read; an empty line ends it."""
        if self._at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if not line:
            return self._take_event()
        field, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._check_size(len(line))
            self._size += len(line)
            self._data.append(value)
        elif field == "event":
            self._name = value
        return None  # `id` and `retry` are for reconnecting, which a completion cannot; a comment has an empty field

    def _take_event(self) -> Event | None:
        data, name = self._data, self._name
        self._data, self._name, self._size = [], "", 0
        return Event("\n".join(data), name or "message") if data else None

    def _check_size(self, num_more: int) -> None:
        if self._size + num_more > self._max_event_bytes:
            raise ValueError(f"an event is larger than {self._max_event_bytes} bytes")
