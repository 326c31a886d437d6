"""Loops and their tries in the registry's database, where every server that shares it looks.

All of it blocks. One server at a time has the claim of a loop, and only with it the loop goes on. What people ask of it
is its `wish`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, delete, exists, func, insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import loop_references, loop_tries, names, versions
from serve.adapters.registry.tables import loops as table
from serve.adapters.registry.work_table import Claims
from serve.errors import NotFound
from serve.loop.objects import Loop, Outcome, Phase, State, Try
from serve.loop.reference_rows import ReferenceRows
from serve.names import shown
from serve.sequential.sequential_test import Verdict

# The row that stops every loop; tries and references that are kept of one.
EVERY = "every"
TRIES_KEPT = 200
MONTH_SECONDS = 31 * 86_400.0
# What a loop has of no try.
_NO_TRY = {
    "live": 0, "job": "", "candidate": 0, "has_share": False, "held_out": "", "look": 0.0, "traffic_since": 0.0,
    "gathered_until": 0.0,
}  # fmt: skip


class LoopRows(Claims[Loop]):
    """The table of loops."""

    table = table
    worked_on = tuple(Phase)

    def __init__(self, registry: Registry, *, me: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__(registry, me=me, clock=clock)
        self.references = ReferenceRows(registry, clock)

    def _rows(self) -> Select[Any]:
        return select(table, names.c.name).join(names, names.c.id == table.c.name_id)

    def _read(self, row: Row[Any]) -> Loop:
        # What a later version knows more of a loop is passed over.
        state = msgspec.json.decode(row.state, type=State)
        wish = json.loads(row.wish) if row.wish else None
        return Loop(row.id, row.name, Phase(row.status), state, wish, row.stopped)

    # Loops

    def all(self) -> list[Loop]:
        """Every adapter that has one."""
        with self._registry.reading() as connection:
            return [self._read(row) for row in connection.execute(self._rows())]

    def get(self, name: str) -> Loop | None:
        with self._registry.reading() as connection:
            row = connection.execute(self._rows().where(names.c.name == name)).first()
        return None if row is None else self._read(row)

    def made(self, name: str) -> Loop:
        """The adapter's loop, which waits if there was none yet."""
        if loop := self.get(name):
            return loop
        with self._registry.adding() as connection:
            id = connection.scalar(select(names.c.id).where(names.c.name == name).with_for_update())
            if id is None:
                raise NotFound(f"The adapter `{shown(name)}` does not exist.", code="model_not_found", param="name")
            if connection.scalar(select(table.c.id).where(table.c.name_id == id)) is None:
                row = {"id": f"loop-{secrets.token_hex(8)}", "name_id": id, "status": Phase.WAITING.value}
                connection.execute(insert(table).values(**row, state=_encoded(State(since=self._clock()))))
            return self._read(connection.execute(self._rows().where(table.c.name_id == id)).one())

    def forget(self, id: str) -> None:
        """If its adapter is gone, so are the examples of its traffic. A snapshot may not know the adapter yet."""
        has_versions = exists().where(versions.c.name_id == table.c.name_id)
        with self._registry.adding() as connection:
            if connection.scalar(select(table.c.id).where(table.c.id == id, has_versions)) is not None:
                return
            for other in (loop_references, loop_tries):
                connection.execute(delete(other).where(other.c.loop == id))
            connection.execute(delete(table).where(table.c.id == id))

    # What people ask

    def wish(self, loop: Loop, what: str, by: str, why: str = "", unless: str = "") -> dict[str, Any] | None:
        """Whoever drives the loop does this next; `unless` that was asked before and is not done, which is given."""
        wish = {"what": what, "by": shown(by, 256), "why": shown(why, 500)}
        with self._registry.adding() as connection:
            there = connection.scalar(select(table.c.wish).where(table.c.id == loop.id).with_for_update())
            before: dict[str, Any] = json.loads(there or "{}")
            if before.get("what") == unless:
                return before
            connection.execute(update(table).where(table.c.id == loop.id).values(wish=json.dumps(wish)))
        return None

    def look(self, loop: Loop) -> None:
        """There is something new to see: whoever drives it looks now."""
        with self._registry.adding() as connection:
            row = connection.execute(select(table.c.state).where(table.c.id == loop.id).with_for_update()).first()
            if row is not None:
                state = replace(msgspec.json.decode(row.state, type=State), look=0.0)
                connection.execute(update(table).where(table.c.id == loop.id).values(state=_encoded(state)))

    def grant(self, loop: Loop) -> None:
        """What was asked is done."""
        with self._registry.adding() as connection:
            where = (table.c.id == loop.id) & (table.c.wish == json.dumps(loop.wish))
            connection.execute(update(table).where(where).values(wish=None))

    def stop(self, loop: Loop | None, by: str | None) -> None:
        """By whom the loop is stopped, or None: it may go on; without a loop all of them."""
        stopped = None if by is None else shown(by, 256)
        with self._registry.adding() as connection:
            if loop is None and connection.scalar(select(table.c.id).where(table.c.id == EVERY)) is None:
                connection.execute(insert(table).values(id=EVERY, status="every", state=_encoded(State())))
            where = table.c.id == (EVERY if loop is None else loop.id)
            connection.execute(update(table).where(where).values(stopped=stopped))

    def stopped(self) -> str | None:
        """Who stopped all of them."""
        with self._registry.reading() as connection:
            return connection.scalar(select(table.c.stopped).where(table.c.id == EVERY))

    # Who drives it

    def is_mine(self, loop: Loop) -> bool:
        """This server drives its try still, and nobody has stopped or rejected it since."""
        now = self.held(loop.id)
        if now is None or self.stopped():
            return False
        same = (now.phase, now.state.number, now.stopped) == (loop.phase, loop.state.number, None)
        return same and (now.wish is None or now.wish == loop.wish)

    def enter(
        self, loop: Loop, phase: Phase | None = None, content: Mapping[str, Any] | None = None, **state: Any
    ) -> Loop | None:
        """The loop in another phase, or further in the one it is in, and what its try has to say of that; None if the
        claim is another's by now, or the try came further or to its end meanwhile."""
        with self._registry.adding() as connection:
            entered = self._enter(connection, loop, phase, **state)
            if entered is not None and content:
                _add(connection, loop, content)
            return entered

    def begin(self, loop: Loop, alpha: float, content: Mapping[str, Any], live: int, since: float) -> Loop | None:
        """A new try, against this version; what moved began to move at `since`."""
        with self._registry.adding() as connection:
            of = loop_tries.c.loop == loop.id
            number = (connection.scalar(select(func.max(loop_tries.c.number)).where(of)) or 0) + 1
            now = self._clock()
            state = {"number": number, "tried": now, "alpha": alpha, "live": live, "traffic_since": since}
            begun = self._enter(connection, loop, Phase.GATHERING, **state, look=0.0, note="")
            if begun is not None:
                row = {"loop": loop.id, "number": number, "began": now, "alpha": alpha}
                connection.execute(insert(loop_tries).values(**row, content=json.dumps(dict(content))))
                # What this month has spent is still counted.
                old = (loop_tries.c.number <= number - TRIES_KEPT, loop_tries.c.ended < now - MONTH_SECONDS)
                connection.execute(delete(loop_tries).where(of, *old))
            return begun

    def add(self, loop: Loop, **content: Any) -> None:
        """Evidence of the try that goes on."""
        with self._registry.adding() as connection:
            _add(connection, loop, content)

    def hear(self, loop: Loop, verdict: Mapping[str, Any]) -> None:
        """What a server says of the canary of the try that goes on; what one called worse no other one proves."""
        with self._registry.adding() as connection:
            before = connection.scalar(select(loop_tries.c.content).where(_try(loop)).with_for_update())
            said = json.loads(before or "{}").get("canary")
            if said is None or said["verdict"] != Verdict.WORSE.value:
                _add(connection, loop, {"canary": verdict})

    def end(self, loop: Loop, outcome: Outcome | None, content: Mapping[str, Any], **state: Any) -> Loop | None:
        """The try is over, with an outcome or without having been one; what was held out goes unless it became a
        reference."""
        with self._registry.adding() as connection:
            ended = self._enter(connection, loop, Phase.WAITING, **{**_NO_TRY, **state})
            if ended is None:
                return None
            row = _try(loop)
            if outcome is None:
                connection.execute(delete(loop_tries).where(row))
            else:
                _add(connection, loop, content)
                values = {"ended": self._clock(), "outcome": outcome.value}
                connection.execute(update(loop_tries).where(row).values(**values))
            refs = loop_references.c
            connection.execute(delete(loop_references).where(refs.loop == loop.id, refs.label.is_(None)))
            return ended

    def _enter(self, connection: Connection, loop: Loop, phase: Phase | None, **state: Any) -> Loop | None:
        phase = phase or loop.phase
        if phase is not loop.phase:
            state["since"] = self._clock()
        changed = replace(loop, phase=phase, state=replace(loop.state, **state))
        where = (table.c.id == loop.id) & (table.c.claimed_by == self._me)
        columns = select(table.c.status, table.c.state)
        there = connection.execute(columns.where(where).with_for_update()).first()
        # A step that went on for long may know an older try, or the same one before its end.
        number = None if there is None else msgspec.json.decode(there.state, type=State).number
        if there is None or (there.status, number) != (loop.phase.value, loop.state.number):
            return None
        values = {"status": phase.value, "state": _encoded(changed.state)}
        connection.execute(update(table).where(where).values(values))
        return changed

    # Tries

    def tries(self, loop: Loop, limit: int = 20) -> list[Try]:
        """The latest first."""
        query = select(loop_tries).where(loop_tries.c.loop == loop.id).order_by(loop_tries.c.number.desc())
        with self._registry.reading() as connection:
            return [_read_try(row) for row in connection.execute(query.limit(limit))]

    def spent(self, loop: Loop, since: float) -> tuple[int, float]:
        """Tries that were decided since then, or may be, and their alpha together: also what began before that."""
        decided = loop_tries.c.ended.is_(None) | (loop_tries.c.ended >= since)
        of = (loop_tries.c.loop == loop.id, decided)
        query = select(func.count(), func.coalesce(func.sum(loop_tries.c.alpha), 0.0)).select_from(loop_tries)
        with self._registry.reading() as connection:
            count, alpha = connection.execute(query.where(*of)).one()
        return int(count), float(alpha)


def _try(loop: Loop) -> Any:
    return (loop_tries.c.loop == loop.id) & (loop_tries.c.number == loop.state.number)


def _add(connection: Connection, loop: Loop, content: Mapping[str, Any]) -> None:
    """To a try that goes on; one that has ended stays as it is."""
    goes_on = _try(loop) & loop_tries.c.ended.is_(None)
    before = connection.scalar(select(loop_tries.c.content).where(goes_on).with_for_update())
    if before is not None:
        values = {"content": json.dumps({**json.loads(before), **content})}
        connection.execute(update(loop_tries).where(_try(loop)).values(**values))


def _read_try(row: Any) -> Try:
    return Try(row.loop, row.number, row.began, row.alpha, row.ended, row.outcome, json.loads(row.content))


def _encoded(state: State) -> str:
    return json.dumps(asdict(state))
