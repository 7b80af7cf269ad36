"""Which decoder replica a conversation goes to: the one that most likely still holds its KV blocks.

Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded load (Mirrokni, Thorup and Zadimoghaddam, 2016):
every caller ranks the replicas of a conversation alike without talking to the others, a replica added or removed
moves only its own share of conversations, and a replica above its fair load is passed over. A hint, never
correctness: any replica can serve any conversation.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


def rank(key: str, replicas: Sequence[str], load: Mapping[str, int], slack: float) -> list[str]:
    """All replicas, best first: by rendezvous hash, those above `slack` times the mean load after the others.

    `load` counts calls in flight per replica, as far as this caller knows; a replica it does not name has none.
    """
    ordered = sorted(replicas, key=lambda replica: _weight(key, replica), reverse=True)
    total = sum(load.get(replica, 0) for replica in replicas) + 1  # with the call being placed
    bound = math.ceil(slack * total / max(len(replicas), 1))
    below = [replica for replica in ordered if load.get(replica, 0) < bound]
    return below + [replica for replica in ordered if load.get(replica, 0) >= bound]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}/{replica}".encode(), digest_size=8).digest()


class AffinityRouter(RequestRouter):
    """Serve's router for the decoder pool. The conversation's key travels as the handle's session id."""

    def initialize_state(self, **kwargs: Any) -> None:
        """`slack`: how far above the mean load a replica may go before conversations pass it over."""
        self._slack = float(kwargs.get("slack", 1.25))
        self._load: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # without it a full pool is asked in a busy loop
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        key = pending_request.metadata.session_id or pending_request.metadata.internal_request_id
        return [[by_id[name]] for name in rank(key, list(by_id), self._load, self._slack)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._load[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._load[replica_id.unique_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        del self._load[replica_id.unique_id]
