"""All supervised engines of a server, by the name of their base model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from serve.engine.supervisor import Adapters, Supervisor
from serve.errors import ConfigError, NotFound


class Fleet:
    """The first supervisor answers a request that names no base.

    `base_of` says which base an adapter belongs to, by its full name; None is the first.
    """

    def __init__(
        self, supervisors: Iterable[Supervisor], base_of: Callable[[str], str | None] = lambda name: None
    ) -> None:
        self._supervisors = {supervisor.name: supervisor for supervisor in supervisors}
        self._base_of = base_of
        if not self._supervisors:
            raise ConfigError("a server needs a model: give one as MODEL")

    @property
    def first(self) -> Supervisor:
        return next(iter(self._supervisors.values()))

    def __iter__(self) -> Iterator[Supervisor]:
        return iter(self._supervisors.values())

    def __contains__(self, name: object) -> bool:
        return name in self._supervisors

    def get(self, name: str | None) -> Supervisor:
        """The base of that name; the first for None."""
        if name is None:
            return self.first
        if name not in self._supervisors:
            raise NotFound(f"there is no engine {name!r} here: GET /v1/engines lists them", param="engine")
        return self._supervisors[name]

    def of(self, adapter: str) -> Supervisor:
        """Whose engine answers for an adapter."""
        return self.get(self._base_of(adapter))

    def owner(self, adapter: str) -> Supervisor | None:
        """As `of`; None for an adapter whose base is not served here (any more)."""
        return self._supervisors.get(self._base_of(adapter) or self.first.name)

    async def start(self, adapters: Adapters) -> None:
        """Every engine, one after the other: two that start at once fight for the same memory and cores."""
        for supervisor in self:
            await supervisor.start(adapters)

    async def stop(self) -> None:
        await asyncio.gather(*(supervisor.stop() for supervisor in self))
