"""Replicas on Ray without an engine.

    python -m tests.support.ray_replica MODEL [FLAG ...]

serves with such replicas.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from starlette.types import ASGIApp

from serve.config import Config
from serve.server.ray_serve import Replica
from tests.support.backend import FakeBackend
from tests.support.counted_server import stand_in


class FakeReplica(Replica):
    """As a replica, over a FakeBackend. It answers with its process id."""

    def _backends(self, config: Config) -> list[FakeBackend]:
        backends = []
        for base in config.bases:
            backend = FakeBackend(base.model)
            backend.name = base.name
            backend.say = lambda fields: f"{os.getpid()} says"
            backends.append(backend)
        return backends


class CountedReplica(FakeReplica):
    """What `counted_server` is alone, but that it counts nothing."""

    def _backends(self, config: Config) -> list[FakeBackend]:
        backends = super()._backends(config)
        for backend in backends:
            backend.say = None
            backend.generation = replace(backend.generation, text="Hello to you.")  # there is something to keep of it
        return backends

    def __serve_build_asgi_app__(self) -> ASGIApp:
        built = super().__serve_build_asgi_app__()
        assert self._app is not None
        if any(policy.loop.on for policy in self._config.policies):
            stand_in(self._app.state.parts)
        return built


def main() -> None:
    from serve.config import load
    from serve.server import ray_serve
    from tests.support import ray_replica

    ray_serve.Replica = ray_replica.CountedReplica  # type: ignore[misc]

    def config() -> Config:
        return load([sys.argv[1], "--name", "base", *sys.argv[2:]])

    sys.exit(ray_serve.serve(config(), config))


if __name__ == "__main__":
    main()
