"""How a route says what an answer is: whole, or event by event. One rendering serves one response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from omnilmm.api.responses import Answer, ChatCompletion, ChunkWriter, Heading, chat_completion
from omnilmm.api.sse import DONE, encode_error, encode_event
from omnilmm.errors import OmniError
from omnilmm.messages import Delta, FinishReason, Usage


class Rendering(Protocol):
    """`whole`, or else `begin`, any `delta` and one `finish` per choice in any order, and `end`.

    `fail` may come after anything but `end`, and nothing after it.
    """

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Mapping[str, Any]: ...

    def begin(self) -> Iterator[bytes]: ...

    def delta(self, index: int, delta: Delta) -> Iterator[bytes]: ...

    def finish(self, index: int, finish: FinishReason) -> Iterator[bytes]: ...

    def end(self, usage: Usage) -> Iterator[bytes]: ...

    def fail(self, error: OmniError) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class ChatRendering:
    """Chat completions."""

    heading: Heading
    num_choices: int
    include_usage: bool

    @property
    def _writer(self) -> ChunkWriter:
        return ChunkWriter(self.heading, self.include_usage)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatCompletion:
        return chat_completion(self.heading, answers, usage)

    def begin(self) -> Iterator[bytes]:
        for index in range(self.num_choices):
            yield encode_event(self._writer.first(index))

    def delta(self, index: int, delta: Delta) -> Iterator[bytes]:
        yield encode_event(self._writer.delta(delta, index))

    def finish(self, index: int, finish: FinishReason) -> Iterator[bytes]:
        yield encode_event(self._writer.last(finish, index))

    def end(self, usage: Usage) -> Iterator[bytes]:
        if self.include_usage:
            yield encode_event(self._writer.usage(usage))
        yield DONE

    def fail(self, error: OmniError) -> Iterator[bytes]:
        yield encode_error(error)
