"""Adapters for calls: found in memory, or brought there by a thread that takes no steps, and let go of at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from omnilmm.engine.shelf import AdapterShelf, Loaded, unusable
from omnilmm.errors import CheckpointError, DeadlineExceeded, Overloaded, ReplicaLost

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 0.5
"""How long a call waits for room before it is refused."""

Submit = Callable[[Callable[[str], Loaded], str], Any]
"""Runs a function on the loader's thread, one after another: `submit` of an executor with one thread."""


class AdapterLoader:
    """Holds adapters for calls. May be used from any thread and event loop.

    Args:
        shelf: from now on touched through this object only.
        gate: a lock around the shelf's books, held for moments.
        submit: see above; raises RuntimeError once it takes nothing more.
    """

    def __init__(self, shelf: AdapterShelf, *, gate: AbstractContextManager[Any], submit: Submit) -> None:
        self._shelf = shelf
        self._gate = gate
        self._submit = submit

    async def hold(self, name: str, *, ends_at: float) -> Loaded:
        """The adapter, in memory until it is released. `ends_at` is a time of the running event loop.

        Raises:
            NotFound: there is no adapter of that name.
            Overloaded: all room is in use, and was for half a second.
            DeadlineExceeded: it took too long.
            ReplicaLost: nothing is loaded any more.
            OmniError: its files cannot be used.
        """
        loop = asyncio.get_running_loop()
        begun, pause = loop.time(), 0.01
        while True:
            try:
                return await self._hold(name, ends_at)
            except Overloaded:  # an answer's adapter is let go of a moment after its last token is out
                if loop.time() - begun > PATIENCE_S:
                    raise
                await asyncio.sleep(pause)
                pause *= 2

    async def _hold(self, name: str, ends_at: float) -> Loaded:
        with self._gate:
            held = self._shelf.try_hold(name)
        if held is not None:
            return held
        try:
            job = self._submit(self._load, name)
        except RuntimeError:
            raise ReplicaLost("The decode replica has stopped.") from None
        try:
            async with asyncio.timeout_at(ends_at):
                loaded: Loaded = await asyncio.wrap_future(job)
                return loaded
        except BaseException as error:
            if not job.cancelled():  # too late to call it off, and nobody waits for what it holds
                job.add_done_callback(self._release_unwanted)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("The answer could not be completed in time.") from None
            raise

    def release(self, adapter: Loaded) -> None:
        """The call is over: no step will use the adapter for it."""
        with self._gate:
            self._shelf.release(adapter)

    def check_integrity(self) -> None:
        """As `AdapterShelf.check_integrity`."""
        with self._gate:
            self._shelf.check_integrity()

    def _release_unwanted(self, job: Any) -> None:
        if not job.cancelled() and job.exception() is None:
            self.release(job.result())

    def _load(self, name: str) -> Loaded:
        """On the loader's thread. One adapter is loaded at a time, so nobody else is loading the same."""
        with self._gate:
            if held := self._shelf.try_hold(name):
                return held
        try:
            weights = self._shelf.read(name)
        except CheckpointError as error:
            logger.error("the adapter %s cannot be used: %s", name, error.message)
            with self._gate:
                self._shelf.note_broken(name)
            raise unusable() from None
        with self._gate:
            ranks = self._shelf.take_room(weights.rank)
        try:
            self._shelf.fill(ranks, weights)
        except BaseException:
            with self._gate:
                self._shelf.give_back(ranks)
            raise
        with self._gate:
            return self._shelf.admit(name, weights, ranks)
