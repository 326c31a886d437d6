"""A replica on Ray without an engine: it answers with its process id."""

from __future__ import annotations

import os

from serve.config import Config
from serve.server.ray_serve import Replica
from tests.support.backend import FakeBackend


class FakeReplica(Replica):
    """As a replica, over a FakeBackend."""

    def _backends(self, config: Config) -> list[FakeBackend]:
        backends = []
        for base in config.bases:
            backend = FakeBackend(base.model)
            backend.name = base.name
            backend.say = lambda fields: f"{os.getpid()} says"
            backends.append(backend)
        return backends
