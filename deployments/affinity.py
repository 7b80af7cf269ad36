"""Which decoder replica a conversation goes to: the one that most likely still holds its KV blocks.

Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded load (Mirrokni, Thorup and Zadimoghaddam, 2016):
every caller ranks the replicas of a conversation alike without talking to the others, a replica added or removed
moves only its own share of conversations, and a replica above its fair load is passed over. Where a caller has sent
a conversation before, it goes again, be that replica a little too full: to compute a conversation anew keeps more
people waiting than one call more does. A hint, never correctness: any replica can serve any conversation.

A conversation with an adapter is another one than the same words without: their KV blocks differ. Where more adapters
are in use than a replica has room for, each keeps to as many replicas as there is room for, the same for every caller.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

HOME_ROOM = 2
"""How many calls above the bound a replica may hold and still be asked again for a conversation it holds."""
MAX_HOMES = 10_000
"""Conversations a caller remembers the replica of; those longest not asked about are forgotten."""
ACTIVE_S = 600.0
"""How long an adapter that nobody asks for counts as one in use."""


def with_adapter(adapter: str, key: str) -> str:
    """The key of a conversation with an adapter, from that of its words."""
    return f"{adapter}:{key}"


def places(adapter: str, replicas: Sequence[str], num_adapters: int, max_loaded: int, slack: float) -> list[str]:
    """The replicas that an adapter keeps to, so that `num_adapters` of them find room where `max_loaded` fit.

    Hashing does not spread adapters evenly: `slack` leaves room for that. What one keeps to with many adapters it also
    keeps to with few.
    """
    most = len(replicas) * max_loaded / max(num_adapters, 1)
    count = len(replicas) if num_adapters <= max_loaded else max(1, int(most / slack))
    return sorted(replicas, key=lambda replica: _weight(adapter, replica), reverse=True)[:count]


def rank(
    key: str,
    replicas: Sequence[str],
    load: Mapping[str, int],
    slack: float,
    home: str | None = None,
    *,
    preferred: Collection[str] = (),
) -> list[str]:
    """All replicas, best first: by rendezvous hash, those above `slack` times the mean load after the others.

    `load` counts calls in flight per replica, as far as this caller knows; a replica it does not name has none.
    `home` has answered the conversation's last turn. It comes first while it is at most `HOME_ROOM` above the bound.
    The `preferred` go before the others, as far as they are below the bound.
    """
    ordered = sorted(replicas, key=lambda replica: (replica in preferred, _weight(key, replica)), reverse=True)
    total = sum(load.get(replica, 0) for replica in replicas) + 1  # with the call being placed
    bound = math.ceil(slack * total / max(len(replicas), 1))
    if home in ordered and load.get(home, 0) < bound + HOME_ROOM:
        ordered.remove(home)
        return [home, *_below_first(ordered, load, bound)]
    return _below_first(ordered, load, bound)


def _below_first(ordered: Sequence[str], load: Mapping[str, int], bound: int) -> list[str]:
    below = [replica for replica in ordered if load.get(replica, 0) < bound]
    return below + [replica for replica in ordered if load.get(replica, 0) >= bound]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}/{replica}".encode(), digest_size=8).digest()


class AffinityRouter(RequestRouter):
    """Serve's router for the decoder pool. The conversation's key travels as the handle's session id."""

    def initialize_state(self, **kwargs: Any) -> None:
        """`slack`: how far above the mean load a replica may go before conversations pass it over. `max_loaded`: how
        many adapters a replica has room for."""
        self._slack = float(kwargs.get("slack", 1.25))
        self._max_loaded = int(kwargs.get("max_loaded", 0))
        self._asked_at: OrderedDict[str, float] = OrderedDict()  # by adapter, the one asked for longest ago first
        self._load: Counter[str] = Counter()
        self._homes: OrderedDict[str, str] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # without it a full pool is asked in a busy loop
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        key = pending_request.metadata.session_id or pending_request.metadata.internal_request_id
        names, home = list(by_id), self._homes.get(key)
        preferred = self._places(key, names)
        return [[by_id[name]] for name in rank(key, names, self._load, self._slack, home, preferred=preferred)]

    def _places(self, key: str, replicas: Sequence[str]) -> Collection[str]:
        """What the conversation's adapter keeps to, by the adapters that this caller was asked for of late."""
        adapter = key.rpartition(":")[0]
        if not adapter or not self._max_loaded:
            return ()
        now = time.monotonic()
        self._asked_at[adapter] = now
        self._asked_at.move_to_end(adapter)
        while next(iter(self._asked_at.values())) < now - ACTIVE_S:
            self._asked_at.popitem(last=False)
        return places(adapter, replicas, len(self._asked_at), self._max_loaded, self._slack)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._load[replica_id.unique_id] += 1
        if key := pending_request.metadata.session_id:
            self._homes[key] = replica_id.unique_id
            self._homes.move_to_end(key)
            if len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._load[replica_id.unique_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        del self._load[replica_id.unique_id]
