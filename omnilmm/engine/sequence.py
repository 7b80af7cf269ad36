"""One request as the engine sees it: tokens it has, tokens it owes, blocks it holds.

The positions of a sequence fall into intervals with one owner each:

    0 ............ num_computed ............ num_ready ............ num_tokens
    |  in the pool  |   owed, payable by     |  owed, behind a       |
    |               |   any step             |  picture not yet here |

A new token is drawn when a step pays the last one owed; it is then owed itself. Preemption moves `num_computed`
back to 0 and changes nothing else, so the tokens that follow are the same. A matcher, too, stays where it is.
"""

from __future__ import annotations

from collections import abc
from enum import IntEnum

from omnilmm.engine.blocks import block_digest, root_digest
from omnilmm.engine.grammar import Matcher
from omnilmm.engine.pictures import Pictures
from omnilmm.engine.plan import Draw, Row
from omnilmm.messages import FinishReason, GenerateCall, Prefill, Priority


class Status(IntEnum):
    """Ordered: a sequence only moves down, but for preemption, which takes it from RUNNING back to WAITING."""

    WAITING = 0  # holds no block
    RUNNING = 1  # holds blocks, and may get into a plan
    STOPPED = 2
    LENGTH = 3
    ABORTED = 4
    FAILED = 5

    @property
    def is_finished(self) -> bool:
        return self >= Status.STOPPED


FINISH_REASONS: abc.Mapping[Status, FinishReason] = {
    Status.STOPPED: FinishReason.STOP,
    Status.LENGTH: FinishReason.LENGTH,
}
"""What the client is told. The other endings have an error, or nobody left to tell."""


class Sequence:
    """State of one request. Ids count submissions, so the lower of two came first.

    `matcher` stands behind the call's emitted tokens; None where the answer may have any form. `ranks` are the rows of
    the call's adapter, which stay its own until the sequence has ended.
    """

    def __init__(
        self,
        sequence_id: int,
        call: GenerateCall,
        *,
        block_size: int,
        submitted_at: float,
        matcher: Matcher | None = None,
        ranks: range | None = None,
    ) -> None:
        self.id = sequence_id
        self.call = call
        self.submitted_at = submitted_at
        self.pictures = Pictures(call.images)
        self.status = Status.WAITING
        self.num_computed = 0
        self.block_ids: list[int] = []
        self.has_started = False  # it has run before, be it waiting again now
        self._prefill: Prefill | None = None
        self._matcher = matcher
        self._ranks = ranks
        self._block_size = block_size
        self._ids = [*call.prompt.ids, *call.emitted]
        self._digests = [root_digest(call.scope, call.adapter)]  # the root, then one per full block
        self._finish_if_done()  # an earlier replica may have emitted everything and died before saying so

    @property
    def priority(self) -> Priority:
        return self.call.priority

    # -- tokens ---------------------------------------------------------------------------------------

    @property
    def ids(self) -> abc.Sequence[int]:
        """Prompt and everything generated. To be read, not changed."""
        return self._ids

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_prompt(self) -> int:
        return len(self.call.prompt.ids)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, those emitted by an earlier replica included."""
        return len(self._ids) - self.num_prompt

    def append(self, token_id: int) -> None:
        """Add a drawn token; the sequence may be finished afterwards.

        Raises:
            InvalidRequest: it cannot be found out how the answer's form goes on.
        """
        assert self.status is Status.RUNNING, "only a running sequence draws"
        self._ids.append(token_id)
        self._finish_if_done()
        if self._matcher is not None and not self.status.is_finished:
            self._matcher.advance([token_id])

    def _finish_if_done(self) -> None:
        # The context cannot run out first: a call is admitted only if its prompt and max_tokens fit together.
        if self.num_generated and self._ids[-1] in self.call.sampling.stop_ids:
            self.status = Status.STOPPED
        elif self.num_generated >= self.call.sampling.max_tokens:
            self.status = Status.LENGTH

    # -- debt -----------------------------------------------------------------------------------------

    @property
    def num_owed(self) -> int:
        """Tokens whose keys and values are not in the pool."""
        return self.num_tokens - self.num_computed

    @property
    def num_ready(self) -> int:
        """End of the positions that can be computed: where the first missing picture begins, or all."""
        return self.ready_after(self.num_computed)

    @property
    def num_payable(self) -> int:
        """Tokens a plan may pay now."""
        return self.num_ready - self.num_computed

    def ready_after(self, num_computed: int) -> int:
        """What `num_ready` would be with the first `num_computed` positions in the pool."""
        missing = self.pictures.first_missing(num_computed)
        return self.num_tokens if missing is None else max(num_computed, missing)

    # -- blocks ---------------------------------------------------------------------------------------

    def digests(self, num_blocks: int) -> abc.Sequence[bytes]:
        """Digests of the first `num_blocks` blocks, which must be full."""
        assert num_blocks * self._block_size <= self.num_tokens, "a block that is not full has no digest"
        for block in range(len(self._digests) - 1, num_blocks):
            start, end = block * self._block_size, (block + 1) * self._block_size
            marks = self.pictures.marks(start, end)
            self._digests.append(block_digest(self._digests[-1], self._ids[start:end], marks))
        return self._digests[1 : num_blocks + 1]

    def fills(self, num_tokens: int) -> list[tuple[int, bytes]]:
        """Blocks that become full when the next `num_tokens` are computed, each with its digest."""
        first, end = self.num_computed // self._block_size, (self.num_computed + num_tokens) // self._block_size
        return list(zip(self.block_ids[first:end], self.digests(end)[first:], strict=True)) if first < end else []

    def start(self, block_ids: abc.Sequence[int], num_cached: int, *, now: float) -> None:
        """Run on these blocks, whose first `num_cached` positions are computed already."""
        assert self.status is Status.WAITING, "only a waiting sequence starts"
        self.status = Status.RUNNING
        self.block_ids = list(block_ids)
        self.num_computed = num_cached
        if not self.has_started:  # what a start after a preemption finds in the pool is nobody's business
            self.has_started = True
            self._prefill = Prefill(
                num_prompt_tokens=self.num_prompt,
                num_cached_tokens=min(num_cached, self.num_prompt),
                kv_images=self.pictures.indices_within(num_cached),
                queue_s=now - self.submitted_at,
            )

    def take_prefill(self) -> Prefill | None:
        """How the prompt was paid for, the first time it is asked; None ever after."""
        prefill, self._prefill = self._prefill, None
        return prefill

    def stop(self, status: Status) -> list[int]:
        """Leave RUNNING for `status` (or stay finished), and give up all blocks; they are the caller's to release."""
        self.status = status
        block_ids, self.block_ids, self.num_computed = self.block_ids, [], 0
        return block_ids

    # -- a step ---------------------------------------------------------------------------------------

    def row(self, num_tokens: int) -> Row:
        """The next `num_tokens` tokens as a row of a plan."""
        assert 0 < num_tokens <= self.num_payable, "a plan pays only what is owed and ready"
        start, end = self.num_computed, self.num_computed + num_tokens
        return Row(
            sequence_id=self.id,
            ids=tuple(self._ids[start:end]),
            start=start,
            block_ids=tuple(self.block_ids[: -(-end // self._block_size)]),
            pictures=tuple(self.pictures.slices(start, end)),
            ranks=self._ranks,
            draw=self._draw() if end == self.num_tokens else None,
        )

    def _draw(self) -> Draw:
        sampling = self.call.sampling
        counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        repeats = sampling.repetition_penalty != 1.0
        may_stop = self.num_generated >= sampling.min_tokens
        generated = tuple(self._ids[self.num_prompt :]) if counts or repeats else ()
        return Draw(
            sampling=sampling,
            position=self.num_generated,
            generated=generated if counts else (),
            seen=self.call.prompt.penalty_ids + generated if repeats else (),
            allowed=None if self._matcher is None else self._matcher.mask(may_stop=may_stop),
        )
