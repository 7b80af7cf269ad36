"""What event loops tell the thread that owns the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from omnilmm.engine.grammar import Matcher
from omnilmm.engine.shelf import Loaded
from omnilmm.engine.stream import TokenStream
from omnilmm.messages import Embedding, GenerateCall

Fetch = Callable[[str], Awaitable[Embedding | None]]
"""Finds the vectors under a key wherever they may be; None if they are nowhere."""


@dataclass(eq=False, slots=True)
class Request:
    """A call between its reader, on an event loop, and its sequence, on the thread."""

    call: GenerateCall
    fetch: Fetch
    stream: TokenStream
    matcher: Matcher | None = None  # the thread's from the moment it is posted
    adapter: Loaded | None = None  # held for it; the thread's from the moment it is posted
    sequence_id: int = -1  # written and read by the thread only
    fetching: set[asyncio.Task[None]] = field(default_factory=set)  # the event loop's
    is_closed: bool = False  # the event loop's: the reader has left


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Supply:
    request: Request
    key: str
    embedding: Embedding


@dataclass(frozen=True, slots=True)
class Abort:
    request: Request


@dataclass(frozen=True, slots=True)
class Drain:
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Message = Submit | Supply | Abort | Drain | Stop
