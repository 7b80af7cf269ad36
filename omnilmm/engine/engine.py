"""The engine: submit calls, take steps, receive tokens. Single-threaded; `loop` gives it a thread.

A step is choose, run, commit: the scheduler decides on paper, the runner computes, and here the books are brought
up to date and the news is told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from omnilmm.config import EngineConfig
from omnilmm.engine.admission import check_call
from omnilmm.engine.grammar import Matcher
from omnilmm.engine.newcomers import Lookout, Newcomers, nobody
from omnilmm.engine.plan import Drawn, Needs, Plan, Row, ShouldYield, StepResult, StepYielded
from omnilmm.engine.scheduler import Scheduler
from omnilmm.engine.sequence import FINISH_REASONS, Sequence, Status
from omnilmm.errors import InvalidRequest, OmniError
from omnilmm.messages import Embedding, GenerateCall, Prefill, Priority, TokenBatch
from omnilmm.ports import Clock


class Runner(Protocol):
    """What computes a plan; `runner.ModelRunner` is the one with a model."""

    @property
    def vocab_size(self) -> int: ...

    def run(self, plan: Plan, should_yield: ShouldYield = ...) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted call's name from now on, and the keys of pictures whose vectors must be supplied."""

    sequence_id: int
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence's next token, and the last news of it if `batch.finish` is set."""

    sequence_id: int
    batch: TokenBatch


@dataclass(frozen=True, slots=True)
class Failed:
    """The last news of a sequence that could not be computed. The others of its step are unharmed."""

    sequence_id: int
    error: OmniError


Output = Tokens | Needs | Failed


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Totals are counted since the start; `cached_tokens` of the `prompt_tokens` were found in the pool.

    `computed_tokens` have gone through the model: prompts, generated tokens, and what preemption had computed again.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_online: int = 0  # of those
    num_waiting_batch: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    num_failed: int = 0  # sequences that ended with an error of their own
    num_preemptions: int = 0
    num_steps: int = 0
    num_yielded: int = 0  # steps given up for somebody who waits; not among num_steps
    last_step_sequences: int = 0
    last_step_tokens: int = 0


class Engine:
    """Sequences by id, and the three collaborators of a step."""

    def __init__(self, runner: Runner, config: EngineConfig, *, clock: Clock = time) -> None:
        self._runner = runner
        self._config = config
        self._clock = clock
        self._scheduler = Scheduler(config, clock)
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._news: list[Output] = []  # told with the next step
        self._is_stalled = False  # the last plan was empty, and nothing has happened since
        self._last_plan = Plan()
        self._num_steps = self._num_yielded = self._num_failed = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = self._computed_tokens = 0

    # -- calls ----------------------------------------------------------------------------------------

    def submit(self, call: GenerateCall, *, matcher: Matcher | None = None, ranks: range | None = None) -> Ticket:
        """Take a call in. One with a grammar comes with a matcher that has followed its emitted tokens, one with an
        adapter with the rows that are the adapter's until the sequence has ended.

        Raises:
            ContextLengthExceeded: it could not fit, even alone.
            InvalidRequest: a field of the call is impossible.
            Overloaded: too many calls of its class are waiting.
        """
        assert (matcher is None) == (call.sampling.grammar is None), "a grammar is followed by a matcher"
        check_call(call, self._config, vocab_size=self._runner.vocab_size)
        sequence = Sequence(
            self._next_id,
            call,
            block_size=self._config.block_size,
            submitted_at=self._clock.monotonic(),
            matcher=matcher,
            ranks=ranks,
        )
        self._next_id += 1
        if sequence.status.is_finished:  # everything was emitted elsewhere; only the ending is left to tell
            prefill = Prefill(num_prompt_tokens=sequence.num_prompt, num_cached_tokens=0, kv_images=(), queue_s=0.0)
            batch = TokenBatch(prefill=prefill, finish=FINISH_REASONS[sequence.status])
            self._news.append(Tokens(sequence.id, batch))
            return Ticket(sequence.id, ())
        self._scheduler.submit(sequence)
        self._sequences[sequence.id] = sequence
        self._is_stalled = False
        return Ticket(sequence.id, self._scheduler.take_unasked(sequence))

    def supply(self, sequence_id: int, key: str, embedding: Embedding) -> None:
        """Hand over vectors that were asked for. A sequence that has ended meanwhile does not mind."""
        if sequence := self._sequences.get(sequence_id):
            sequence.pictures.supply(key, embedding)
            self._is_stalled = False

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence and free its blocks, now. One that has ended already is not missed."""
        if sequence := self._sequences.get(sequence_id):
            self._end(sequence, Status.ABORTED)
            self._is_stalled = False

    # -- steps ----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could do anything. If not, nothing changes before the next submit, supply or abort."""
        return bool(self._news) or (bool(self._sequences) and not self._is_stalled)

    @property
    def is_empty(self) -> bool:
        """No sequence is left, and no news of one."""
        return not self._sequences and not self._news

    def step(self, newcomers: Newcomers = nobody) -> list[Output]:
        """Compute some of what is owed, and tell what came of it.

        While it is computed, `newcomers` is asked again and again who has come since it began. If one of them goes
        before all whose rows are in the step, it is given up: its rows are computed anew in a later one.
        """
        plan = self._scheduler.choose()
        lookout = Lookout(newcomers, partial(self._scheduler.makes_way, plan))
        try:
            result = self._runner.run(plan, lookout.should_yield)
        except StepYielded:
            assert lookout.found is not None, "a step was given up for nobody"
            self._scheduler.charge_given_up(plan, lookout.found)
            self._num_yielded += 1
            outputs, self._news = [*self._news, *plan.needs], []
            return outputs
        return self._commit(plan, result)

    def _commit(self, plan: Plan, result: StepResult) -> list[Output]:
        outputs, self._news = [*self._news, *plan.needs], []
        for row in plan.rows:
            outputs.extend(self._settle(row, result))
        self._is_stalled = not plan.rows
        if plan.rows:
            self._num_steps += 1
            self._computed_tokens += plan.num_tokens
            self._last_plan = plan
        return outputs

    def _settle(self, row: Row, result: StepResult) -> Iterator[Output]:
        sequence = self._sequences[row.sequence_id]
        if error := result.failures.get(sequence.id):
            self._end(sequence, Status.FAILED)
            yield Failed(sequence.id, error)
            return
        self._scheduler.advance(sequence, row.num_tokens)
        if drawn := result.drawn.get(sequence.id):
            try:
                sequence.append(drawn.id)
            except InvalidRequest as error:
                self._end(sequence, Status.FAILED)
                yield Failed(sequence.id, error)
            else:
                yield Tokens(sequence.id, self._tell(sequence, drawn))

    def _tell(self, sequence: Sequence, drawn: Drawn) -> TokenBatch:
        """Account for a token that was added, and put it into words."""
        self._scheduler.charge_output(sequence)
        self._generated_tokens += 1
        if sequence.status.is_finished:
            self._end(sequence, sequence.status)
        if prefill := sequence.take_prefill():
            self._prompt_tokens += prefill.num_prompt_tokens
            self._cached_tokens += prefill.num_cached_tokens
        return TokenBatch(
            ids=(drawn.id,),
            logprobs=() if drawn.logprob is None else (drawn.logprob,),
            prefill=prefill,
            finish=FINISH_REASONS.get(sequence.status),
        )

    def _end(self, sequence: Sequence, status: Status) -> None:
        self._num_failed += status is Status.FAILED
        self._scheduler.release(sequence, status)
        del self._sequences[sequence.id]

    # -- books ----------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        blocks = self._scheduler.blocks
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_waiting_online=self._scheduler.num_waiting_of(Priority.ONLINE),
            num_waiting_batch=self._scheduler.num_waiting_of(Priority.BATCH),
            blocks_used=blocks.num_held,
            blocks_total=blocks.num_blocks,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            computed_tokens=self._computed_tokens,
            num_failed=self._num_failed,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_yielded=self._num_yielded,
            last_step_sequences=len(self._last_plan.rows),
            last_step_tokens=self._last_plan.num_tokens,
        )

    def check_integrity(self) -> None:
        """AssertionError if sequences, queues and blocks do not add up."""
        self._scheduler.check_integrity()
        num_known = self._scheduler.num_running + self._scheduler.num_waiting
        assert num_known == len(self._sequences), "the scheduler has lost or kept a sequence"
