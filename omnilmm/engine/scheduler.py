"""Who is paid in the next step.

Every sequence owes tokens, and a step pays some of them within `max_step_tokens`. Decode and prefill are not modes: a
sequence that owes one token is about to decode, one that owes many is prefilling. Per priority class, the order is
decodes, then chunks of prompts that have begun, then sequences from the queue, fairest tenant first. Of ONLINE's none
is started in a step that reads `enough_step_tokens` of prompts already: it would keep their first tokens waiting.
ONLINE has all of its turn before BATCH has any, and pushes BATCH out where room is short. Beside ONLINE tokens BATCH
gets a few a step; a step that is all BATCH is full, and is given up when somebody ONLINE comes.

Something like it holds among ONLINE tenants too: prompts of one that is favoured, because it asks for well less than
its share, are read in a step of their own, and the step under way when it comes is given up, at its cost.

A running sequence holds blocks for all its tokens. When there is none for the next, the lowest in rank gives up its
own and waits; it computes them again later (or finds them in the prefix cache) and goes on with the same tokens.
"""

from __future__ import annotations

import math
from collections import Counter, abc

from omnilmm.config import EngineConfig
from omnilmm.engine.blocks import BlockManager
from omnilmm.engine.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from omnilmm.engine.plan import Needs, Plan, Row
from omnilmm.engine.sequence import Sequence, Status
from omnilmm.errors import QueueFull
from omnilmm.messages import GenerateCall, Priority
from omnilmm.ports import Clock

RETRY_AFTER_S = 1.0
"""A queue that is full now has moved by then; the caller's retry budget bounds the rest."""
GREED = 2
"""Sequences of a tenant that may wait for each that could still be let in: one tenant alone cannot fill the queue."""

Rank = tuple[Priority, bool, float]
"""Class, whether it is stuck behind a missing picture, submission: the highest rank gives way first."""


class _Draft:
    """A plan in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens the step may still compute
        self.filling: set[bytes] = set()  # digests of the blocks that the step will fill
        self.num_online = 0  # tokens of prompts that somebody waits for
        self._rows: dict[int, Row] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.id in self._rows

    def pay(self, sequence: Sequence) -> None:
        """Compute as much of what the sequence owes as is ready and the budget allows."""
        row = sequence.row(min(sequence.num_payable, self.budget))
        if sequence.priority is Priority.ONLINE and sequence.num_owed > 1:
            self.num_online += row.num_tokens
        self.filling.update(digest for _, digest in sequence.fills(row.num_tokens))
        self._rows[sequence.id] = row
        self.budget -= row.num_tokens

    @property
    def has_rows(self) -> bool:
        return bool(self._rows)

    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows.values())


class Scheduler:
    """Owns the queues, the running set and the blocks."""

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.num_preemptions = 0
        self._config = config
        self._clock = clock
        self._enough = config.enough_step_tokens or config.max_step_tokens
        self._queues = {priority: FairQueue() for priority in Priority}
        self._running: dict[int, Sequence] = {}
        self._needs: list[Needs] = []  # found while choosing, for the plan being made

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def num_waiting_of(self, priority: Priority) -> int:
        return len(self._queues[priority])

    # -- in and out -----------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must fit into the pool when alone.

        Raises:
            QueueFull: of its class `max_waiting` sequences wait already, or GREED times as many of its tenant as are
                let in beside them.
        """
        queue = self._queues[sequence.priority]
        num_free = self._config.max_waiting - len(queue)
        if queue.num_of(sequence.call.tenant) >= GREED * num_free:
            raise QueueFull("The decode queue is full.", retry_after=RETRY_AFTER_S)
        queue.push(sequence)

    def release(self, sequence: Sequence, status: Status) -> None:
        """Take a sequence out, wherever it is, and free what it holds.

        After a failure nobody else may find its blocks: what is in them may be the cause.
        """
        if self._running.pop(sequence.id, None) is None:
            self._queues[sequence.priority].remove(sequence)
        block_ids = sequence.stop(status)
        if status is Status.FAILED:
            self.blocks.forget(block_ids)
        self.blocks.release_blocks(block_ids)

    def take_unasked(self, sequence: Sequence) -> tuple[str, ...]:
        """Keys of the pictures that neither came along nor are in the prefix cache, each told once."""
        return sequence.pictures.take_unasked(len(self._find_prefix(sequence)) * self.blocks.block_size)

    # -- choose ---------------------------------------------------------------------------------------

    def choose(self) -> Plan:
        """Decide the next step. Sequences are started, given blocks and preempted here, but nothing is computed."""
        draft = _Draft(self._config.max_step_tokens)
        may_start = True
        for priority in Priority:
            if priority is Priority.BATCH and draft.num_online:
                break  # what a batch adds to a step is added to the time to somebody's first token
            if priority is Priority.BATCH and draft.has_rows:
                draft.budget = min(draft.budget, self._config.batch_beside_online)
            first = self._free_seat(priority)
            if priority is Priority.ONLINE and self._read_favoured(draft):
                break
            running = [sequence for sequence in self._in_rank() if sequence.priority is priority]
            for sequence in running:
                if sequence.num_owed == 1:
                    self._pay_running(sequence, draft)
            for sequence in sorted(running, key=lambda other: self._queues[priority].served(other.call.tenant)):
                if sequence.num_owed > 1:
                    self._pay_running(sequence, draft)
            may_start = may_start and self._start_waiting(priority, draft, first=first)
        needs, self._needs = tuple(self._needs), []
        return Plan(draft.rows(), needs)

    def _read_favoured(self, draft: _Draft) -> bool:
        """Draft what favoured tenants' prompts owe, and their decodes beside it. False if no such prompt can be read:
        then nothing is drafted.

        It ends soon: a prompt is charged when it starts, and a tenant that has used up its favour has none.
        """
        is_favoured = self._queues[Priority.ONLINE].is_favoured
        running = [
            sequence
            for sequence in self._in_rank()
            if sequence.priority is Priority.ONLINE and is_favoured(sequence.call.tenant)
        ]
        for sequence in running:
            if sequence.num_owed > 1:
                self._pay_running(sequence, draft)
        self._start_waiting(Priority.ONLINE, draft, favoured_only=True)
        if draft.has_rows:
            for sequence in running:
                if sequence.num_owed == 1:
                    self._pay_running(sequence, draft)
        return draft.has_rows

    def makes_way(self, plan: Plan, call: GenerateCall) -> bool:
        """Whether a step under way is to be given up for a call that has just come."""
        if call.priority is not Priority.ONLINE:
            return False
        is_favoured = self._queues[Priority.ONLINE].is_favoured
        tenants = {sequence.call.tenant for _, sequence in self._online(plan)}
        others = tenants - {call.tenant}
        return not tenants or (bool(others) and is_favoured(call.tenant) and not any(map(is_favoured, others)))

    def charge_given_up(self, plan: Plan, call: GenerateCall) -> None:
        """A step was given up for this call: its tenant pays what others have to compute again."""
        cost = sum(
            OUTPUT_COST if row.num_tokens == 1 else PROMPT_COST * row.num_tokens for row, _ in self._online(plan)
        )
        self._queues[Priority.ONLINE].fine(call, cost)

    def _online(self, plan: Plan) -> list[tuple[Row, Sequence]]:
        """The rows of a plan that somebody waits for."""
        rows = [(row, self._running[row.sequence_id]) for row in plan.rows]
        return [(row, sequence) for row, sequence in rows if sequence.priority is Priority.ONLINE]

    def _pay_running(self, sequence: Sequence, draft: _Draft) -> None:
        # An earlier one in the same draft may have pushed it out.
        is_running = sequence.status is Status.RUNNING
        if is_running and draft.budget and sequence.num_payable and self._try_grow(sequence, draft):
            draft.pay(sequence)

    def _try_grow(self, sequence: Sequence, draft: _Draft) -> bool:
        """Give a running sequence the blocks its newest tokens need, taking them from those of higher rank.

        False if there are none left: the sequence sits this step out, holding what it has. The lowest in rank
        never meets this, so somebody always moves.
        """
        needed = self.blocks.num_blocks_for(sequence.num_tokens) - len(sequence.block_ids)
        while not self.blocks.can_take(needed):
            victim = self._find_victim(draft, above=_rank(sequence))
            if victim is None:
                return False
            self._preempt(victim)
        sequence.block_ids.extend(self.blocks.take_blocks(needed))
        return True

    def _start_waiting(
        self, priority: Priority, draft: _Draft, *, first: str | None = None, favoured_only: bool = False
    ) -> bool:
        """Start sequences of a class in turn, one of the tenant `first` before others. False if the next one found no
        room: then no lower class may start."""
        while draft.budget and not (priority is Priority.ONLINE and draft.num_online >= self._enough):
            sequence = self._next_startable(priority, draft, first=first)
            first = None
            if sequence is None:
                return True
            if favoured_only and not self._queues[priority].is_favoured(sequence.call.tenant):
                return True
            if not self._try_start(sequence, draft):
                return False
            draft.pay(sequence)
        return True

    def _next_startable(
        self,
        priority: Priority,
        draft: _Draft,
        *,
        first: str | None = None,
        without: abc.Container[str] = (),
        ready_only: bool = False,
    ) -> Sequence | None:
        """The first in turn with something to pay, of all tenants but some; if asked, with all its pictures there.

        Two kinds let the others pass: one that lacks its very next picture, and one whose next block is being
        computed in this very step for another sequence. It will find that block in the pool.
        """
        for sequence in self._queues[priority].in_turn(first):
            if sequence.call.tenant in without:
                continue
            digests = self._shareable_digests(sequence)
            num_found = len(self.blocks.find_prefix(digests))
            if num_found < len(digests) and digests[num_found] in draft.filling:
                continue
            num_cached = num_found * self.blocks.block_size
            if keys := sequence.pictures.take_unasked(num_cached):
                self._needs.append(Needs(sequence.id, keys))  # given away from the pool since it was submitted
            num_ready = sequence.ready_after(num_cached)
            if num_ready == sequence.num_tokens or (num_ready > num_cached and not ready_only):
                return sequence
        return None

    def _free_seat(self, priority: Priority) -> str | None:
        """Let tenants have about as many seats as others, though they be taken for long answers.

        Who waits while another tenant has two more seats than it would have gets the next, whatever it was served: a
        newcomer with all its credit would else keep others waiting for as long as its answers are. One that is
        favoured gets it while another tenant, which is not, has two. If no seat is free, the newest sequence of the
        tenant that has most gives its own up; its blocks stay findable, so it loses little. Seats of lower classes are
        taken first, when a sequence starts.

        No seat goes back and forth: a tenant's only one is nobody's to take, nor are those of the favoured for others,
        and who would be stuck behind a missing picture takes none.

        Returns:
            The tenant that the seat is for.
        """
        peers = [other for other in self._running.values() if other.priority is priority]
        is_full = self.num_running == self._config.max_sequences
        if not peers or (is_full and any(other.priority > priority for other in self._running.values())):
            return None
        held = Counter(other.call.tenant for other in peers)
        is_favoured = self._queues[priority].is_favoured

        def may_take(call: GenerateCall, other: GenerateCall) -> bool:
            if is_favoured(call.tenant) != is_favoured(other.tenant):
                return is_favoured(call.tenant) and held[other.tenant] > 1
            return held[other.tenant] > 1 and (held[call.tenant] + 2) / call.weight < held[other.tenant] / other.weight

        def giver(call: GenerateCall) -> Sequence | None:
            givers = (other for other in peers if may_take(call, other.call))
            return max(givers, key=lambda other: (held[other.call.tenant] / other.call.weight, other.id), default=None)

        enough = {other.call.tenant for other in peers if giver(other.call) is None}
        waiting = self._next_startable(priority, _Draft(0), without=enough, ready_only=True)
        if waiting is None or (found := giver(waiting.call)) is None:
            return None
        if is_full:
            self._preempt(found)
        return waiting.call.tenant

    def _try_start(self, sequence: Sequence, draft: _Draft) -> bool:
        """Give a waiting sequence a seat and blocks for all its tokens, if there is or can be made room.

        Room is taken from lower classes, and within the class from sequences stuck behind a missing picture,
        unless this one is about to be stuck itself.
        """
        prefix = self._find_prefix(sequence)
        num_cached = len(prefix) * self.blocks.block_size
        needed = self.blocks.num_blocks_for(sequence.num_tokens) - len(prefix)
        rank = (sequence.priority, sequence.ready_after(num_cached) < sequence.num_tokens, math.inf)
        while self.num_running == self._config.max_sequences or not self.blocks.can_take(needed, beside=prefix):
            victim = self._find_victim(draft, above=rank)
            if victim is None:
                return False
            self._preempt(victim)
        queue = self._queues[sequence.priority]
        queue.remove(sequence)
        if not sequence.has_started:  # what preemption makes us compute again is not the tenant's doing
            queue.charge(sequence, prompt=sequence.num_tokens - num_cached)
        self.blocks.share_blocks(prefix)
        sequence.start(prefix + self.blocks.take_blocks(needed), num_cached, now=self._clock.monotonic())
        self._running[sequence.id] = sequence
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the pool that hold the beginning of a sequence."""
        return self.blocks.find_prefix(self._shareable_digests(sequence))

    def _shareable_digests(self, sequence: Sequence) -> abc.Sequence[bytes]:
        """Digests of the blocks it may take from others: its last token is always left to compute, for its logits."""
        return sequence.digests((sequence.num_tokens - 1) // self.blocks.block_size)

    def _in_rank(self) -> list[Sequence]:
        return sorted(self._running.values(), key=_rank)

    def _find_victim(self, draft: _Draft, *, above: Rank) -> Sequence | None:
        """The running sequence of the highest rank, if it is above the given one and not in the draft."""
        victim = max((other for other in self._running.values() if other not in draft), key=_rank, default=None)
        return victim if victim is not None and _rank(victim) > above else None

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        del self._running[sequence.id]
        self.blocks.release_blocks(sequence.stop(Status.WAITING))
        self._queues[sequence.priority].push(sequence)

    # -- commit ---------------------------------------------------------------------------------------

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """These tokens were computed: whoever shares the prefix may use the blocks they filled."""
        filled = sequence.fills(num_tokens)
        sequence.num_computed += num_tokens
        for block_id, digest in filled:
            self.blocks.publish(block_id, digest)

    def charge_output(self, sequence: Sequence) -> None:
        """A token was drawn for the sequence's tenant."""
        self._queues[sequence.priority].charge(sequence, output=1)

    def check_integrity(self) -> None:
        """Compare queues, seats and blocks with one another. AssertionError if the books are wrong."""
        self.blocks.check_integrity(sequence.block_ids for sequence in self._running.values())
        assert len(self._running) <= self._config.max_sequences, "more sequences run than there are seats"
        for sequence in self._running.values():
            num_positions = len(sequence.block_ids) * self.blocks.block_size
            assert sequence.status is Status.RUNNING, "a sequence has a seat and does not run"
            assert sequence.num_computed < sequence.num_tokens, "a running sequence owes nothing"
            assert sequence.num_computed <= num_positions, "tokens were computed outside a sequence's blocks"
        for queue in self._queues.values():
            queue.check_integrity()
            for sequence in queue.in_turn():
                assert sequence.status is Status.WAITING, "a sequence waits and runs"
                assert not sequence.block_ids, "a waiting sequence holds blocks"
                assert sequence.num_computed == 0, "a waiting sequence has computed tokens"


def _rank(sequence: Sequence) -> Rank:
    return (sequence.priority, sequence.num_payable == 0, sequence.id)
