"""Ray Serve's router, which sends a request to a home of its adapter: no replica sends it on then.

Ray builds one in each of its proxies. Ranks are tried in their order, and within one whoever has least to do.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from serve.fleet.routed import RoutedServers

log = logging.getLogger(__name__)


# Without FIFOMixin: it would give a replica that was chosen for one request to another one, which came before.
class HomesRouter(RequestRouter):
    """Homes below 1.125 times the mean load, then replicas that hold the adapter, then all."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._servers = RoutedServers(time.monotonic())

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Also when one of them tells something new."""
        self._servers.see({replica.replica_id.unique_id: replica.routing_stats for replica in replicas})
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # None of them has room: Ray waits before it asks again.
        pending_request.routing_context.should_backoff = True
        keyed = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        try:
            loads = {
                key: float(self.replica_queue_len_cache.get(replica.replica_id) or 0) for key, replica in keyed.items()
            }
            ranks = self._servers.ranks(pending_request.metadata.multiplexed_model_id, loads, time.monotonic())
        except Exception:  # Ray would wait for ever
            log.exception("a request is routed without its adapter's homes")
            return [candidate_replicas]
        return [[keyed[key] for key in keys] for keys in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        self._servers.count(pending_request.metadata.multiplexed_model_id)
