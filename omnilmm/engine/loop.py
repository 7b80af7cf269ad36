"""The owner of the engine: one thread that takes steps while there is work and sleeps while there is none.

Nothing else touches the engine. Event loops reach it by messages in an inbox, read before every step, and it reaches
them by calls scheduled on them. So a step never waits for a reader, and a reader's leaving is known within a step.
Nor does it wait for a grammar or an adapter: a call gets into the inbox when its grammar has been compiled and its
adapter is in memory, on other threads.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

from omnilmm.engine.engine import Engine, EngineStats, Failed, Output, Tokens
from omnilmm.engine.grammar import PARAM, GrammarCompiler, Matcher
from omnilmm.engine.inbox import Abort, Drain, Fetch, Message, Request, Stop, Submit, Supply
from omnilmm.engine.loading import AdapterLoader
from omnilmm.engine.plan import Needs
from omnilmm.engine.shelf import AdapterShelf, Loaded
from omnilmm.engine.stream import Ending, TokenStream, flush_interval
from omnilmm.errors import DeadlineExceeded, InvalidRequest, NotFound, OmniError, Overloaded, ReplicaLost
from omnilmm.messages import GenerateCall, TokenBatch
from omnilmm.models.device import apart
from omnilmm.observe import Observer, PrefillDone, Silent, StepRun
from omnilmm.ports import Clock

logger = logging.getLogger(__name__)

NUM_COMPILERS = 2
"""So that one bad schema, which may take seconds to be refused, does not keep the good ones waiting."""


class EngineLoop:
    """Streams over an engine. Its coroutines may be awaited on any event loop.

    Args:
        engine: from `start` to `stop` it belongs to the thread.
        grammars: compiles the forms that answers may be asked to have; without it, such calls are refused.
        adapters: the low-rank adapters that calls may name; without it, such calls are refused.
        flush_interval_s, max_batch_tokens: how tokens of a lone stream are bundled, see `stream`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        grammars: GrammarCompiler | None = None,
        adapters: AdapterShelf | None = None,
        observer: Observer | None = None,
        clock: Clock = time,
        flush_interval_s: float = 0.03,
        max_batch_tokens: int = 16,
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="grammar")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter")
        self._adapters: AdapterLoader | None = None
        if adapters is not None:
            self._adapters = AdapterLoader(adapters, gate=threading.Lock(), submit=self._submit_load)
        self._observer = observer or Silent()
        self._clock = clock
        self._flush_interval_s = flush_interval_s
        self._max_batch_tokens = max_batch_tokens
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Between a message coming in and the thread's end. Re-entrant, because the garbage collector may close a
        # forgotten stream, and so post its abort, while the same thread is posting.
        self._gate = threading.RLock()
        self._is_open = False
        self._thread: threading.Thread | None = None
        self._stats = engine.stats()
        # The thread's own:
        self._requests: dict[int, Request] = {}
        self._draining: list[Drain] = []
        self._is_draining = False
        # Calls that messages in the inbox are about. Replaced, never changed, and under the gate.
        self._newcomers: tuple[GenerateCall, ...] = ()

    # -- from outside ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        assert self._thread is None, "started twice"
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """It serves: started, not stopped, and no step has crashed."""
        return self._is_open

    def stats(self) -> EngineStats:
        """The engine's numbers after its latest step or message."""
        return self._stats

    async def generate(self, call: GenerateCall, *, fetch: Fetch) -> AsyncGenerator[TokenBatch, None]:
        """Stream a call's tokens. Closing the iterator, or being cancelled in it, frees the sequence within a step.

        `fetch` is asked for those pictures only whose vectors neither came along nor are needless because the KV
        prefix holds them, each at most once. If it finds one nowhere, the stream ends with a batch that names it.

        Raises:
            InvalidRequest, ContextLengthExceeded: the call is impossible, or the form asked for cannot be followed.
            NotFound: there is no adapter of that name.
            Overloaded: too many calls wait, be it for a grammar, the loop is draining, or no adapter can be put away.
            DeadlineExceeded: `call.timeout_s` has passed.
            ReplicaLost: the loop was stopped.
            OmniError: this sequence, or the engine, has failed.
        """
        ends_at = asyncio.get_running_loop().time() + call.timeout_s
        matcher = await self._start_matcher(call)
        stream = TokenStream(flush_interval_s=self._flush_interval, max_batch_tokens=self._max_batch_tokens)
        adapter = await self._hold_adapter(call, ends_at)
        if adapter is not None:
            call = replace(call, adapter=adapter.key)  # blocks are told apart by what it is, not by its name
        request = Request(call, fetch, stream, matcher, adapter)
        try:
            self._post(Submit(request))
        except ReplicaLost:
            self._let_go(request)
            raise
        deadline = stream.event_loop.call_at(ends_at, self._cut_short, request, _late())
        try:
            while (batch := await stream.take()) is not None:
                yield batch
        finally:
            request.is_closed = True
            if not stream.has_ended:
                self._try_post(Abort(request))
            deadline.cancel()
            for task in request.fetching:
                task.cancel()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, and wait for the accepted ones to finish: whether they did in time."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._try_post(Drain(done)):
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """End open streams with ReplicaLost, free everything, and join the thread."""
        with self._gate:
            if self._is_open:
                self._inbox.put(Stop())
                self._is_open = False
        self._compilers.shutdown(wait=False)  # what is left of it ends by itself
        self._reader.shutdown(wait=False)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _post(self, message: Message) -> None:
        if not self._try_post(message):
            raise ReplicaLost("The decode replica has stopped.")

    def _try_post(self, message: Message) -> bool:
        """False if the thread will not read it."""
        with self._gate:
            if self._is_open:
                self._inbox.put(message)
                if isinstance(message, Submit | Supply):
                    self._newcomers = (*self._newcomers, message.request.call)
            return self._is_open

    def _submit_load(self, load: Callable[[str], Loaded], name: str) -> Future[Loaded]:
        return self._reader.submit(apart, partial(load, name))

    def _flush_interval(self) -> float:
        return flush_interval(self._stats.num_running, least_s=self._flush_interval_s)

    # -- on the event loop of a request ---------------------------------------------------------------

    async def _start_matcher(self, call: GenerateCall) -> Matcher | None:
        """The matcher that a call's grammar asks for, made on a thread that takes no steps."""
        sampling = call.sampling
        if sampling.grammar is None:
            return None
        if self._grammars is None:
            raise InvalidRequest("This model cannot answer in a given form.", param=PARAM)
        with self._gate:
            if not self._is_open:
                raise ReplicaLost("The decode replica has stopped.")
            job = self._compilers.submit(
                self._grammars.start, sampling.grammar, stop_ids=sampling.stop_ids, emitted=call.emitted
            )
        patience_s = self._grammars.limits.patience_s
        try:
            async with asyncio.timeout(min(patience_s, call.timeout_s)):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            if call.timeout_s <= patience_s:
                raise _late() from None
            raise Overloaded("Too many grammars wait to be compiled.", retry_after=1.0) from None

    async def _hold_adapter(self, call: GenerateCall, ends_at: float) -> Loaded | None:
        """The call's adapter, in memory and held for it; None if it names none."""
        if call.adapter is None:
            return None
        if self._adapters is None:
            raise NotFound("This model has no adapters.", param="model", code="model_not_found")
        return await self._adapters.hold(call.adapter, ends_at=ends_at)

    def _receive(self, news: Iterable[tuple[Request, Output]]) -> None:
        for request, output in news:
            match output:
                case Tokens():
                    request.stream.push(output.batch)
                case Failed():
                    request.stream.end(output.error)
                case Needs() if not request.is_closed:
                    task = request.stream.event_loop.create_task(self._fetch(request, output.keys))
                    request.fetching.add(task)
                    task.add_done_callback(request.fetching.discard)

    async def _fetch(self, request: Request, keys: Sequence[str]) -> None:
        """Fetch vectors side by side, each going to the engine as it comes."""

        async def fetch_one(key: str) -> bool:
            embedding = await request.fetch(key)
            if embedding is not None:
                self._try_post(Supply(request, key, embedding))
            return embedding is not None

        outcomes = await asyncio.gather(*map(fetch_one, keys), return_exceptions=True)
        missing = tuple(key for key, outcome in zip(keys, outcomes, strict=True) if outcome is not True)
        if errors := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            self._cut_short(request, errors[0])
        elif missing:
            self._cut_short(request, TokenBatch(missing=missing))

    def _cut_short(self, request: Request, ending: Ending) -> None:
        request.stream.end(ending)
        self._try_post(Abort(request))

    # -- on the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        ending: OmniError = ReplicaLost("The decode replica has stopped.")
        try:
            while self._take_messages():
                self._step()
            for sequence_id in self._requests:
                self._engine.abort(sequence_id)  # whoever stops it finds every block free
        except Exception:
            logger.exception("the engine has crashed")
            ending = OmniError("the engine has crashed")
        finally:
            self._close(ending)

    def _take_messages(self) -> bool:
        """Read the inbox, waiting in it for as long as the engine has nothing to do. False when told to stop."""
        while True:
            has_work = self._engine.has_work
            if not has_work:
                self._rest()
            try:
                message = self._inbox.get(block=not has_work)
            except queue.Empty:
                if self._has_read_all():
                    return True
                continue
            if isinstance(message, Stop):
                return False
            self._handle(message)

    def _has_read_all(self) -> bool:
        """Whether the inbox is empty; then nobody is a newcomer any more."""
        with self._gate:
            is_empty = self._inbox.empty()
            if is_empty:
                self._newcomers = ()
            return is_empty

    def _rest(self) -> None:
        """Nothing can be computed at the moment."""
        self._stats = self._engine.stats()
        if self._engine.is_empty:
            self._engine.check_integrity()
            if self._adapters is not None:
                self._adapters.check_integrity()
            self._finish_draining()

    def _handle(self, message: Submit | Supply | Abort | Drain) -> None:
        match message:
            case Submit(request):
                self._submit(request)
            case Supply(request, key, embedding):
                self._engine.supply(request.sequence_id, key, embedding)
            case Abort(request):
                self._abort(request)
            case Drain():
                self._is_draining = True
                self._draining.append(message)

    def _submit(self, request: Request) -> None:
        try:
            if self._is_draining:
                raise Overloaded("The decode replica is about to stop.", retry_after=1.0)
            ranks = None if request.adapter is None else request.adapter.ranks
            ticket = self._engine.submit(request.call, matcher=request.matcher, ranks=ranks)
        except OmniError as error:
            self._let_go(request)
            self._tell([(request, Failed(-1, error))])
            return
        request.sequence_id = ticket.sequence_id
        self._requests[ticket.sequence_id] = request
        if ticket.missing:
            self._tell([(request, Needs(ticket.sequence_id, ticket.missing))])

    def _step(self) -> None:
        begun = self._clock.monotonic()
        outputs = self._engine.step(lambda: self._newcomers)
        seconds = self._clock.monotonic() - begun
        # A sequence aborted after its last news was written has no request any more.
        known = [output for output in outputs if output.sequence_id in self._requests]
        self._tell([(self._requests[output.sequence_id], output) for output in known])
        for output in known:
            if isinstance(output, Failed) or (isinstance(output, Tokens) and output.batch.finish is not None):
                self._forget(output.sequence_id)
        self._observe(outputs, seconds)

    def _observe(self, outputs: Sequence[Output], seconds: float) -> None:
        before, self._stats = self._stats, self._engine.stats()
        now = self._stats
        if now.num_steps > before.num_steps:
            self._observer.emit(
                StepRun(
                    num_sequences=now.last_step_sequences,
                    num_tokens=now.last_step_tokens,
                    seconds=seconds,
                    blocks_used=now.blocks_used,
                    blocks_total=now.blocks_total,
                    num_waiting=now.num_waiting,
                )
            )
        for output in outputs:
            if isinstance(output, Tokens) and (prefill := output.batch.prefill):
                self._observer.emit(PrefillDone(prefill.queue_s, prefill.num_prompt_tokens, prefill.num_cached_tokens))

    def _tell(self, news: Sequence[tuple[Request, Output]]) -> None:
        """Hand news to the event loops they belong to, in one call each."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Output]]] = {}
        for request, output in news:
            by_loop.setdefault(request.stream.event_loop, []).append((request, output))
        for event_loop, share in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(self._receive, share)
            except RuntimeError:  # the event loop was closed, and its readers with it
                for request, _ in share:
                    self._abort(request)

    def _abort(self, request: Request) -> None:
        self._engine.abort(request.sequence_id)
        self._forget(request.sequence_id)

    def _forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        request = self._requests.pop(sequence_id, None)
        if request is not None:
            self._let_go(request)

    def _let_go(self, request: Request) -> None:
        """No step will use the adapter for this request."""
        adapter, request.adapter = request.adapter, None
        if adapter is not None and self._adapters is not None:
            self._adapters.release(adapter)

    def _finish_draining(self) -> None:
        for drain in self._draining:
            with suppress(RuntimeError):  # whoever waited has closed its event loop
                drain.done.get_loop().call_soon_threadsafe(_resolve, drain.done)
        self._draining.clear()

    def _close(self, ending: OmniError) -> None:
        """Let no message in any more, and answer everyone who still expects something."""
        with self._gate:
            self._is_open = False
        with suppress(queue.Empty):
            while True:
                match self._inbox.get_nowait():
                    case Submit(request):
                        self._let_go(request)
                        self._tell([(request, Failed(request.sequence_id, ending))])
                    case Drain() as drain:
                        self._draining.append(drain)
        self._tell([(request, Failed(request.sequence_id, ending)) for request in self._requests.values()])
        for sequence_id in list(self._requests):
            self._forget(sequence_id)
        self._stats = self._engine.stats()
        self._finish_draining()


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("The answer could not be completed in time.")


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
