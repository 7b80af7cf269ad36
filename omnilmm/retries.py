"""What bounds the work for one request: its deadline, and how often a lost replica's part is sent again."""

from __future__ import annotations

from omnilmm.errors import DeadlineExceeded, ReplicaLost
from omnilmm.observe import Observer, Retried
from omnilmm.ports import Clock


class Deadline:
    """A moment `timeout_s` from now."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self._clock = clock
        self._at = clock.monotonic() + timeout_s

    def remaining(self) -> float:
        """Seconds that are left, more than 0.

        Raises:
            DeadlineExceeded: there are none.
        """
        left = self._at - self._clock.monotonic()
        if left <= 0:
            raise DeadlineExceeded("The request ran out of its time.")
        return left


class RetryBudget:
    """Retries may add at most a tenth to the calls made, with a reserve for when many calls fail at one blow.

    Envoy's retry budget, as a token bucket: each first try deposits 0.1, each retry withdraws 1. Twice the reserve is
    the most that is saved up.
    """

    def __init__(self, ratio: float = 0.1, reserve: float = 10.0) -> None:
        self._ratio, self._most = ratio, 2 * reserve
        self._balance = reserve

    def deposit(self) -> None:
        self._balance = min(self._balance + self._ratio, self._most)

    @property
    def balance(self) -> float:
        """Retries that could be made now."""
        return self._balance

    def try_withdraw(self) -> bool:
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True


class Retries:
    """The one place where a call to a replica is made again: the rule for all calls of a flow.

    Args:
        budget: what retries are paid from.
        observer: is told of each.
    """

    max_attempts = 3
    """Per stage of a request. A request that kills whoever serves it takes no more replicas along than this."""

    resume_reserve = 64.0
    """A decoder takes this many running streams along when it dies (its `max_sequences`); all shall go on elsewhere.
    They have a purse of their own, because a stream that got as far as a token is no part of a storm of failures."""

    def __init__(self, budget: RetryBudget, observer: Observer) -> None:
        self._budget = budget
        self._resumptions = RetryBudget(reserve=self.resume_reserve)
        self._observer = observer

    def note_request(self) -> None:
        """A request has come: a first try."""
        self._budget.deposit()
        self._resumptions.deposit()

    def check(self, lost: ReplicaLost, stage: str, attempt: int, *, resuming: bool = False) -> None:
        """Return if attempt number `attempt` may be followed by another; raise `lost` if not.

        `resuming`: the call has had a part of its answer, and goes on from there.
        """
        purse = self._resumptions if resuming else self._budget
        if attempt >= self.max_attempts or not purse.try_withdraw():
            raise lost
        self._observer.emit(Retried(stage))
