"""The thread and its streams. Where order matters, a gate lets the engine take one step at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest
from engine_fakes import CONFIG, PaperRunner, lone_run, make_call, make_vectors
from grammar_fakes import ANY_OBJECT, RECORD, formed, the_compiler

from omnilmm.engine.engine import Engine
from omnilmm.engine.grammar import Matcher
from omnilmm.engine.loop import NUM_COMPILERS, EngineLoop
from omnilmm.engine.plan import Plan, ShouldYield, StepResult, StepYielded, never
from omnilmm.engine.runner import ModelRunner
from omnilmm.engine.schema_check import GrammarLimits
from omnilmm.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    OmniError,
    Overloaded,
    ReplicaLost,
)
from omnilmm.messages import Embedding, FinishReason, GenerateCall, Priority, Sampling, TokenBatch
from omnilmm.observe import Event, PrefillDone, StepRun

PATIENCE_S = 30  # nothing here may hang
PICTURE = {"pictures": [("a", 4, 8)]}


class Gate(PaperRunner):
    """A runner whose steps wait to be allowed; `arrived` tells that one is waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)
        self.is_open = False
        self.asked: list[bool] = []  # what each step, as it began, would have said to whether it is to be given up

    def run(self, plan: Plan, should_yield: ShouldYield = never) -> StepResult:
        self.asked.append(should_yield())
        if plan.rows and not self.is_open:
            self.arrived.release()
            assert self.allowed.acquire(timeout=PATIENCE_S), "the test forgot the gate"
        return super().run(plan, should_yield)

    def open(self) -> None:
        self.is_open = True
        self.allowed.release(1000)

    async def wait(self) -> None:
        """Until a step has been chosen and is about to run."""
        assert await asyncio.to_thread(self.arrived.acquire, timeout=PATIENCE_S), "no step came"


class Crash(PaperRunner):
    def run(self, plan: Plan, should_yield: ShouldYield = never) -> StepResult:
        if plan.rows:
            raise RuntimeError("the runner broke")
        return super().run(plan, should_yield)


class Patient(PaperRunner):
    """A runner whose first steps end only when they are told to yield, as often as is asked for, if none of their rows
    is among `spared`: ids of the sequences that steps are given up for."""

    def __init__(self, num_yields: int, *, spared: range) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.num_left = num_yields
        self._spared = spared

    def run(self, plan: Plan, should_yield: ShouldYield = never) -> StepResult:
        if plan.rows and self.num_left and not any(row.sequence_id in self._spared for row in plan.rows):
            self.num_left -= 1
            self.begun.release()
            end = time.monotonic() + PATIENCE_S
            while not should_yield():
                assert time.monotonic() < end, "nobody told it to yield"
                time.sleep(0.001)
            raise StepYielded
        return super().run(plan, should_yield)


class SlowCompiler:
    """Compiles when it is let, and says when it has been asked."""

    def __init__(self, timeout_s: float = PATIENCE_S) -> None:
        self.limits = GrammarLimits(timeout_s=timeout_s)
        self.arrived = threading.Semaphore(0)
        self.allowed = threading.Event()

    def start(self, grammar, **settings) -> Matcher:
        self.arrived.release()
        assert self.allowed.wait(PATIENCE_S), "the test forgot the compiler"
        return the_compiler().start(grammar, **settings)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.arrived.acquire, timeout=PATIENCE_S), "nobody asked"


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


MakeLoop = Callable[..., EngineLoop]


@pytest.fixture
def make_loop(model) -> Iterator[MakeLoop]:
    """Loops over the small model, or over the runner given; stopped, and their books checked, at the end."""
    loops: list[tuple[EngineLoop, Engine, object]] = []

    def make(runner: PaperRunner | None = None, *, observer=None, config=CONFIG, **settings) -> EngineLoop:
        engine = Engine(runner or ModelRunner(model, config), config)
        loop = EngineLoop(engine, observer=observer, **settings)
        loops.append((loop, engine, runner))
        loop.start()
        return loop

    yield make
    for loop, engine, runner in loops:
        if isinstance(runner, Gate):
            runner.open()
        loop.stop()
        assert not loop.is_healthy
        if not isinstance(runner, Crash):
            engine.check_integrity()
            assert engine.stats().blocks_used == 0


async def fetch_nothing(key: str) -> Embedding | None:
    raise AssertionError(f"asked for {key}")


async def fetch_vectors(key: str) -> Embedding | None:
    return make_vectors(key, 8)


async def collect(loop: EngineLoop, call: GenerateCall, fetch=fetch_nothing) -> list[TokenBatch]:
    async with asyncio.timeout(PATIENCE_S):
        return [batch async for batch in loop.generate(call, fetch=fetch)]


def ids_of(batches: list[TokenBatch]) -> tuple[int, ...]:
    return tuple(token_id for batch in batches for token_id in batch.ids)


# -- classes ------------------------------------------------------------------------------------------


async def test_a_step_of_a_batch_is_given_up_for_somebody_who_comes(make_loop):
    patient = Patient(num_yields=2, spared=range(1, 3))
    loop = make_loop(patient)
    batch = asyncio.ensure_future(collect(loop, make_call(6, max_tokens=4, priority=Priority.BATCH)))
    answers = []
    for seed in (1, 2):
        assert await asyncio.to_thread(patient.begun.acquire, timeout=PATIENCE_S)
        answers.append(await collect(loop, make_call(6, seed=seed, max_tokens=2)))
    assert [len(ids_of(batches)) for batches in answers] == [2, 2]
    assert len(ids_of(await batch)) == 4
    assert loop.stats().num_yielded == 2


async def test_a_step_of_a_batch_goes_on_when_more_of_the_batch_comes(make_loop):
    patient = Patient(num_yields=1, spared=range(2, 3))
    loop = make_loop(patient)
    first = asyncio.ensure_future(collect(loop, make_call(6, max_tokens=4, priority=Priority.BATCH)))
    assert await asyncio.to_thread(patient.begun.acquire, timeout=PATIENCE_S)
    second = asyncio.ensure_future(collect(loop, make_call(6, seed=1, max_tokens=4, priority=Priority.BATCH)))
    await asyncio.sleep(0.05)  # it has posted, and a step that heard of it would have ended
    assert loop.stats().num_yielded == 0
    await collect(loop, make_call(6, seed=2, max_tokens=2))
    assert len(ids_of(await first)) == len(ids_of(await second)) == 4
    assert loop.stats().num_yielded == 1


async def test_a_step_is_given_up_for_a_tenant_that_asks_for_little(make_loop):
    patient = Patient(num_yields=0, spared=range(2, 3))
    loop = make_loop(patient, config=CONFIG.resolve(num_blocks=2400, max_context=9600))
    await collect(loop, make_call(9000, max_tokens=2, tenant="greedy"))
    patient.num_left = 1
    greedy = asyncio.ensure_future(collect(loop, make_call(6, seed=1, max_tokens=4, tenant="greedy")))
    assert await asyncio.to_thread(patient.begun.acquire, timeout=PATIENCE_S)
    assert len(ids_of(await collect(loop, make_call(6, seed=2, max_tokens=2, tenant="modest")))) == 2
    assert len(ids_of(await greedy)) == 4
    assert loop.stats().num_yielded == 1


async def test_who_has_been_read_is_no_newcomer(make_loop):
    """A step of a batch that began after somebody's message was read is not given up for that message."""
    gate = Gate()
    loop = make_loop(gate)
    is_asked, is_there = asyncio.Event(), asyncio.Event()

    async def fetch_late(key: str) -> Embedding:
        is_asked.set()
        await is_there.wait()
        return make_vectors(key, 8)

    batch = asyncio.ensure_future(collect(loop, make_call(6, max_tokens=3, priority=Priority.BATCH)))
    await gate.wait()
    waits = make_call(12, seed=1, max_tokens=2, pictures=[("a", 0, 8)], with_vectors=False)
    online = asyncio.ensure_future(collect(loop, waits, fetch_late))  # nothing of it can be computed yet
    await asyncio.sleep(0)
    gate.allowed.release()
    await asyncio.wait_for(is_asked.wait(), PATIENCE_S)
    gate.open()
    assert len(ids_of(await batch)) == 3
    is_there.set()
    assert len(ids_of(await online)) == 2
    assert len(gate.asked) >= 5
    assert not any(gate.asked)


# -- streams ------------------------------------------------------------------------------------------


async def test_a_stream_is_the_lone_run(make_loop, model):
    call = make_call(11, max_tokens=20)
    batches = await collect(make_loop(), call)
    assert ids_of(batches) == lone_run(model, call)
    assert [batch.finish for batch in batches][-1] is FinishReason.LENGTH
    assert batches[0].prefill.num_prompt_tokens == 11
    assert all(batch.prefill is None and batch.ids for batch in batches[1:])


async def test_many_streams_at_once(make_loop, model):
    loop = make_loop(config=CONFIG.resolve(num_blocks=24))
    calls = [make_call(4 + n, seed=n, sampling=Sampling(0, temperature=1.0, seed=n)) for n in range(12)]
    answers = await asyncio.gather(*(collect(loop, call) for call in calls))
    assert [ids_of(batches) for batches in answers] == [lone_run(model, call) for call in calls]


async def test_equal_request_ids_do_not_meet(make_loop, model):
    loop = make_loop()
    calls = [make_call(6, seed=n, request_id="same") for n in range(3)]
    answers = await asyncio.gather(*(collect(loop, call) for call in calls))
    assert [ids_of(batches) for batches in answers] == [lone_run(model, call) for call in calls]


async def test_logprobs_arrive_in_step_with_ids(make_loop):
    batches = await collect(make_loop(), make_call(9, max_tokens=20, sampling=Sampling(0, logprobs=1)))
    assert all(len(batch.logprobs) == len(batch.ids) for batch in batches)


async def test_tokens_are_bundled_for_a_slow_reader(make_loop):
    gate = Gate()
    loop = make_loop(gate)
    async with aclosing(loop.generate(make_call(6, max_tokens=12), fetch=fetch_nothing)) as stream:
        first = asyncio.ensure_future(anext(stream))
        await gate.wait()
        gate.allowed.release()
        assert len((await first).ids) == 1
        gate.open()
        await loop.drain(PATIENCE_S)  # while the reader does something else
        assert len((await anext(stream)).ids) == 11


async def test_impossible_calls_raise_where_they_are_made(make_loop, model):
    loop = make_loop()
    with pytest.raises(ContextLengthExceeded):
        await collect(loop, make_call(100, max_tokens=100))
    with pytest.raises(InvalidRequest):
        await collect(loop, make_call((99999,)))
    call = make_call(5)
    assert ids_of(await collect(loop, call)) == lone_run(model, call)


async def test_a_full_queue_is_told_to_the_newcomer(make_loop):
    gate = Gate()
    loop = make_loop(gate, config=CONFIG.resolve(max_waiting=1, max_sequences=1))
    running = asyncio.ensure_future(collect(loop, make_call(6)))
    await gate.wait()
    waiting = asyncio.ensure_future(collect(loop, make_call(6, seed=1)))
    refused = asyncio.ensure_future(collect(loop, make_call(6, seed=2)))
    await asyncio.sleep(0)  # both have posted
    gate.open()
    with pytest.raises(Overloaded):
        await refused
    assert len(ids_of(await running)) == len(ids_of(await waiting)) == 8


async def test_one_failure_leaves_the_others_alone(make_loop, model):
    loop = make_loop()
    bad = make_call(12, **PICTURE)
    bad = replace(bad, images=(replace(bad.images[0], embedding=Embedding("float32", (1, 1), b"")),))
    good = make_call(7)
    failed, batches = await asyncio.gather(collect(loop, bad), collect(loop, good), return_exceptions=True)
    assert isinstance(failed, OmniError)
    assert ids_of(batches) == lone_run(model, good)
    assert loop.is_healthy


# -- leaving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "cancel"])
async def test_a_reader_who_leaves_frees_the_blocks_within_a_step(make_loop, leave):
    gate = Gate()
    loop = make_loop(gate)
    stream = loop.generate(make_call(20, max_tokens=50), fetch=fetch_nothing)
    first = asyncio.ensure_future(anext(stream))
    await gate.wait()
    gate.allowed.release()
    await first
    await gate.wait()
    assert loop.stats().blocks_used > 0
    if leave == "close":
        await stream.aclose()
    else:
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    num_steps = len(gate.plans)
    gate.allowed.release()  # the step that was under way
    assert await loop.drain(PATIENCE_S)
    assert loop.stats().blocks_used == 0
    assert len(gate.plans) == num_steps + 1


async def test_leaving_while_waiting_for_a_seat(make_loop):
    gate = Gate()
    loop = make_loop(gate, config=CONFIG.resolve(max_sequences=1))
    running = asyncio.ensure_future(collect(loop, make_call(6)))
    await gate.wait()
    waiting = asyncio.ensure_future(collect(loop, make_call(6, seed=1)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    gate.open()
    assert len(ids_of(await running)) == 8
    assert await loop.drain(PATIENCE_S)
    assert {row.sequence_id for plan in gate.plans for row in plan.rows} == {0}


async def test_a_deadline_frees_even_without_a_pull(make_loop):
    gate = Gate()
    loop = make_loop(gate)
    stream = loop.generate(make_call(6, timeout_s=0.05), fetch=fetch_nothing)
    first = asyncio.ensure_future(anext(stream))
    await gate.wait()
    gate.allowed.release()
    assert len((await first).ids) == 1
    await gate.wait()
    # Nobody pulls any more; the deadline passes while a step is under way.
    await asyncio.to_thread(threading.Event().wait, 0.1)
    gate.allowed.release()
    assert await loop.drain(PATIENCE_S)
    assert loop.stats().blocks_used == 0
    with pytest.raises(DeadlineExceeded):
        async for _ in stream:
            pass


async def test_a_deadline_ends_a_waiting_reader(make_loop):
    gate = Gate()
    loop = make_loop(gate)
    with pytest.raises(DeadlineExceeded):
        await collect(loop, make_call(6, timeout_s=0.05))


# -- pictures -----------------------------------------------------------------------------------------


async def test_vectors_that_came_along_are_not_fetched(make_loop, model):
    call = make_call(16, **PICTURE)
    assert ids_of(await collect(make_loop(), call)) == lone_run(model, call)


async def test_vectors_are_fetched_when_missing_and_not_when_the_prefix_is_there(make_loop, model):
    loop = make_loop()
    asked = []

    async def fetch(key: str) -> Embedding | None:
        asked.append(key)
        return make_vectors(key, 8)

    call = make_call(20, pictures=[("a", 2, 8), ("b", 11, 8)], with_vectors=False)
    first = await collect(loop, call, fetch)
    assert sorted(asked) == ["a", "b"]
    assert ids_of(first) == lone_run(model, call)
    again = await collect(loop, replace(call, prompt=replace(call.prompt, ids=(*call.prompt.ids, 9, 9))), fetch)
    assert sorted(asked) == ["a", "b"]
    assert again[0].prefill.kv_images == (0, 1)


async def test_a_picture_found_nowhere_ends_the_stream_and_frees_it(make_loop):
    async def fetch(key: str) -> Embedding | None:
        return make_vectors(key, 4) if key == "b" else None

    loop = make_loop()
    call = make_call(30, pictures=[("a", 8, 4), ("b", 14, 4), ("c", 20, 4)], with_vectors=False)
    assert await collect(loop, call, fetch) == [TokenBatch(missing=("a", "c"))]
    assert await loop.drain(PATIENCE_S)
    assert loop.stats().blocks_used == 0


async def test_others_go_on_while_a_picture_is_fetched(make_loop, model):
    loop = make_loop()
    has_come = asyncio.Event()

    async def fetch(key: str) -> Embedding | None:
        await has_come.wait()
        return make_vectors(key, 8)

    call = make_call(16, with_vectors=False, **PICTURE)
    blocked = asyncio.ensure_future(collect(loop, call, fetch))
    other = make_call(9)
    assert ids_of(await collect(loop, other)) == lone_run(model, other)
    has_come.set()
    assert ids_of(await blocked) == lone_run(model, call)


async def test_an_error_while_fetching_ends_the_stream(make_loop):
    async def fetch(key: str) -> Embedding | None:
        raise Overloaded("The store is busy.")

    loop = make_loop()
    with pytest.raises(Overloaded, match="store"):
        await collect(loop, make_call(16, with_vectors=False, **PICTURE), fetch)
    assert await loop.drain(PATIENCE_S)


async def test_leaving_cancels_the_fetch(make_loop):
    has_begun, was_cancelled = asyncio.Event(), asyncio.Event()

    async def fetch(key: str) -> Embedding | None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise
        return None

    loop = make_loop()
    reader = asyncio.ensure_future(collect(loop, make_call(16, with_vectors=False, **PICTURE), fetch))
    async with asyncio.timeout(PATIENCE_S):
        await has_begun.wait()
        reader.cancel()
        await was_cancelled.wait()
    assert await loop.drain(PATIENCE_S)


# -- grammars -----------------------------------------------------------------------------------------


async def test_answers_with_a_form_are_streamed_beside_others(make_loop, model):
    loop = make_loop(grammars=the_compiler())
    samplings = [formed(RECORD), Sampling(0), formed(ANY_OBJECT, temperature=1.0, seed=4), formed(RECORD, seed=2)]
    calls = [make_call(5 + n, seed=n, max_tokens=20, sampling=s) for n, s in enumerate(samplings)]
    answers = await asyncio.gather(*(collect(loop, call) for call in calls))
    assert [ids_of(batches) for batches in answers] == [lone_run(model, call) for call in calls]


async def test_an_answer_with_a_form_goes_on_elsewhere(make_loop, model):
    call = make_call(9, max_tokens=20, sampling=formed(RECORD, temperature=1.0, seed=4))
    whole = lone_run(model, call)
    assert ids_of(await collect(make_loop(grammars=the_compiler()), replace(call, emitted=whole[:5]))) == whole[5:]


async def test_others_go_on_while_a_grammar_is_compiled(make_loop, model):
    compiler = SlowCompiler()
    loop = make_loop(grammars=compiler)
    call, other = make_call(6, max_tokens=20, sampling=formed()), make_call(9)
    formed_answer = asyncio.ensure_future(collect(loop, call))
    await compiler.wait()
    assert ids_of(await collect(loop, other)) == lone_run(model, other)
    assert not formed_answer.done()
    compiler.allowed.set()
    assert ids_of(await formed_answer) == lone_run(model, call)


async def test_one_slow_grammar_does_not_hold_the_next_one_up(make_loop):
    """A call that gives up leaves its compiler behind; there is another, and who finds none is told to come again."""
    compiler = SlowCompiler(timeout_s=0.01)
    loop = make_loop(grammars=compiler)
    for _ in range(NUM_COMPILERS + 2):
        with pytest.raises(Overloaded, match="grammars"):
            await collect(loop, make_call(6, sampling=formed()))
    assert loop.is_healthy
    compiler.allowed.set()


async def test_a_deadline_counts_the_compilation(make_loop):
    compiler = SlowCompiler()
    with pytest.raises(DeadlineExceeded):
        await collect(make_loop(grammars=compiler), make_call(6, sampling=formed(), timeout_s=0.05))
    compiler.allowed.set()


async def test_a_reader_may_leave_while_its_grammar_is_compiled(make_loop):
    compiler = SlowCompiler()
    loop = make_loop(Gate(), grammars=compiler)
    reader = asyncio.ensure_future(collect(loop, make_call(6, sampling=formed())))
    await compiler.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    compiler.allowed.set()
    assert await loop.drain(PATIENCE_S)


async def test_a_stop_during_the_compilation_loses_the_replica(make_loop):
    compiler = SlowCompiler()
    loop = make_loop(grammars=compiler)
    readers = [asyncio.ensure_future(collect(loop, make_call(6, sampling=formed()))) for _ in range(NUM_COMPILERS + 1)]
    for _ in range(NUM_COMPILERS):
        await compiler.wait()
    await asyncio.to_thread(loop.stop)
    compiler.allowed.set()
    for reader in readers:
        with pytest.raises(ReplicaLost):
            await reader
    with pytest.raises(ReplicaLost):
        await collect(loop, make_call(6, sampling=formed()))


async def test_a_form_that_cannot_be_had_is_refused(make_loop, model):
    with pytest.raises(InvalidRequest, match="form") as caught:
        await collect(make_loop(), make_call(6, sampling=formed()))
    assert caught.value.param == "response_format"
    loop = make_loop(grammars=the_compiler())
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        await collect(loop, make_call(6, sampling=replace(formed(), stop_ids=())))
    call = make_call(6, max_tokens=20, sampling=formed())
    assert ids_of(await collect(loop, call)) == lone_run(model, call)


# -- the end ------------------------------------------------------------------------------------------


async def test_draining_finishes_what_runs_and_refuses_what_comes(make_loop):
    gate = Gate()
    loop = make_loop(gate, config=CONFIG.resolve(max_sequences=1))
    accepted = [asyncio.ensure_future(collect(loop, make_call(6, seed=n))) for n in range(2)]
    await gate.wait()
    draining = asyncio.ensure_future(loop.drain(PATIENCE_S))
    await asyncio.sleep(0)
    late = asyncio.ensure_future(collect(loop, make_call(6, seed=2)))
    await asyncio.sleep(0)
    assert not draining.done()
    gate.open()
    assert await draining
    assert [len(ids_of(await task)) for task in accepted] == [8, 8]
    with pytest.raises(Overloaded):
        await late


async def test_a_drain_gives_up_in_time(make_loop):
    gate = Gate()
    loop = make_loop(gate)
    running = asyncio.ensure_future(collect(loop, make_call(6)))
    await gate.wait()
    assert not await loop.drain(0.01)
    gate.open()
    assert len(ids_of(await running)) == 8
    assert await loop.drain(PATIENCE_S)


async def test_stopping_ends_open_streams_with_replica_lost(make_loop):
    gate = Gate()
    loop = make_loop(gate, config=CONFIG.resolve(max_sequences=1))
    streams = [asyncio.ensure_future(collect(loop, make_call(6, seed=n))) for n in range(2)]
    await gate.wait()
    stopping = asyncio.ensure_future(asyncio.to_thread(loop.stop))
    while loop.is_healthy:  # noqa: ASYNC110  the order to stop is on its way from the other thread
        await asyncio.sleep(0)
    gate.allowed.release()
    await stopping
    for stream in streams:
        with pytest.raises(ReplicaLost):
            await stream
    assert not loop.is_healthy
    assert loop.stats().blocks_used == 0
    with pytest.raises(ReplicaLost):
        await collect(loop, make_call(6))
    assert await loop.drain(1)
    loop.stop()


async def test_a_finished_stream_survives_the_stop(make_loop):
    gate = Gate()
    loop = make_loop(gate)
    stream = loop.generate(make_call(6), fetch=fetch_nothing)
    first = asyncio.ensure_future(anext(stream))
    await gate.wait()
    gate.allowed.release()
    assert len((await first).ids) == 1
    gate.open()
    assert await loop.drain(PATIENCE_S)
    loop.stop()
    rest = [batch async for batch in stream]
    assert len(ids_of(rest)) == 7
    assert rest[-1].finish is FinishReason.LENGTH


async def test_a_crash_fails_everyone_and_is_seen(make_loop, caplog):
    loop = make_loop(Crash())
    with pytest.raises(OmniError) as caught:
        await collect(loop, make_call(6))
    assert type(caught.value) is OmniError
    assert "the engine has crashed" in caplog.text
    await asyncio.to_thread(loop.stop)
    assert not loop.is_healthy
    with pytest.raises(ReplicaLost):
        await collect(loop, make_call(6))


async def test_before_the_start_nobody_is_served(model):
    loop = EngineLoop(Engine(ModelRunner(model, CONFIG), CONFIG))
    assert not loop.is_healthy
    with pytest.raises(ReplicaLost):
        await collect(loop, make_call(6))
    loop.stop()


def test_readers_may_come_from_one_event_loop_after_another(make_loop, model):
    loop, call = make_loop(), make_call(9)
    for _ in range(2):
        assert ids_of(asyncio.run(collect(loop, call))) == lone_run(model, call)


def test_a_reader_whose_event_loop_is_gone_is_forgotten(make_loop):
    gate = Gate()
    loop = make_loop(gate)

    async def pull_one() -> None:
        stream = loop.generate(make_call(9, max_tokens=50), fetch=fetch_nothing)
        pulls.append(asyncio.ensure_future(anext(stream)))
        await gate.wait()

    pulls: list[asyncio.Future[TokenBatch]] = []
    event_loop = asyncio.new_event_loop()
    event_loop.run_until_complete(pull_one())
    event_loop.close()
    gate.open()
    assert asyncio.run(loop.drain(PATIENCE_S))
    assert loop.stats().blocks_used == 0
    assert loop.is_healthy


async def test_steps_and_prefills_are_observed(make_loop):
    recorder = Recorder()
    loop = make_loop(observer=recorder)
    await asyncio.gather(collect(loop, make_call(9, max_tokens=3)), collect(loop, make_call(5, seed=1, max_tokens=3)))
    assert await loop.drain(PATIENCE_S)
    steps = [event for event in recorder.events if isinstance(event, StepRun)]
    prefills = [event for event in recorder.events if isinstance(event, PrefillDone)]
    assert sum(step.num_tokens for step in steps) == 9 + 2 + 5 + 2
    assert all(step.seconds > 0 and step.blocks_total == 64 for step in steps)
    assert sorted(prefill.num_prompt_tokens for prefill in prefills) == [5, 9]


async def test_an_idle_loop_takes_no_steps(make_loop):
    gate = Gate()
    gate.open()
    loop = make_loop(gate)
    await collect(loop, make_call(6))
    blocked = asyncio.ensure_future(collect(loop, make_call(9, seed=1, with_vectors=False, **PICTURE), asyncio_never))
    await asyncio.sleep(0)
    other = await collect(loop, make_call(5, seed=2))  # everything before it has been read
    num_steps = len(gate.plans)
    await asyncio.to_thread(threading.Event().wait, 0.05)
    assert len(gate.plans) <= num_steps + 1  # at most one look at what is blocked
    assert len(ids_of(other)) == 8
    blocked.cancel()


async def asyncio_never(key: str) -> Embedding | None:
    await asyncio.Event().wait()
    return None
