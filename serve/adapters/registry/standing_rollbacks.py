"""Rollbacks, and ends of canaries, that hold on this server before the database has them.

A version that does harm has to go also while the database is slow or gone. Such a rollback is noted in a file of the
data directory and laid over each snapshot that is read, as long as the version that it took the traffic from is live
there, or the canary. The registry writes it down once the database answers again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from serve.adapters.registry.snapshot import Snapshot
from serve.files import write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StandingRollback:
    """From `version` of the adapter `name` back to `target`, asked by `by`; without a target its canary ends.

    `generation` is what this server had read by then: later changes come first. An earlier release did not note it.
    """

    name: str
    version: int
    target: int | None
    by: str
    why: str
    generation: int | None = None


class StandingRollbacks:
    """At most one rollback and one end of a canary a name. `file` keeps them over a restart."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._rollbacks: tuple[StandingRollback, ...] = ()
        if file is not None and file.exists():
            try:
                self._rollbacks = tuple(StandingRollback(**row) for row in json.loads(file.read_text()))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read, and the rollbacks in it are forgotten: %s", file, error)

    def __bool__(self) -> bool:
        return bool(self._rollbacks)

    def __contains__(self, name: str) -> bool:
        return any(rollback.name == name for rollback in self._rollbacks)

    def holds(self, name: str, *, canary: bool) -> bool:
        """Whether the end of its canary stands, or else a rollback of what is live."""
        return any(each.name == name and (each.target is None) is canary for each in self._rollbacks)

    def all(self) -> list[StandingRollback]:
        return list(self._rollbacks)

    def note(self, rollback: StandingRollback) -> None:
        """It holds from now on; `keep` brings it to the disk."""
        self._rollbacks = (*self._rollbacks, rollback)

    def drop(self, rollback: StandingRollback) -> None:
        self._rollbacks = tuple(other for other in self._rollbacks if other != rollback)

    def keep(self) -> None:
        """Write the file; OSError where the disk does not take it."""
        if self._file is not None:
            write_whole(self._file, json.dumps([asdict(rollback) for rollback in self._rollbacks]).encode())

    def over(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot as it is once these rollbacks are written down; they follow an adapter that was renamed."""
        if not self:
            return snapshot
        entries = dict(snapshot.entries)
        for rollback in self.all():
            if new := snapshot.moved.get(rollback.name):
                self.drop(rollback)
                self.note(rollback := replace(rollback, name=new))
            entry = entries.get(rollback.name)
            if entry is None:
                continue
            if rollback.target is None:
                if entry.canary and entry.canary.adapter.version == rollback.version:
                    entries[rollback.name] = replace(entry, canary=None)
                continue
            if entry.live is None or entry.live.version != rollback.version:
                continue
            if (target := entry.versions.get(rollback.target)) is not None:
                pinned = target if entry.pinned == entry.live else entry.pinned
                entries[rollback.name] = replace(
                    entry, live=target, canary=None, shadow=None, pinned=pinned, trail=entry.trail[:-1]
                )
        return replace(snapshot, entries=entries)
