"""Calls that block, from an event loop: to the durable records above all. They run in a thread; the loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def blocking(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call` returns. It must be thread-safe, as `omnilmm.database` and what is built on it are.

    If the caller is cancelled the call still runs to its end: a transaction is never cut in the middle.
    """
    return await asyncio.to_thread(call, *args, **kwargs)
