"""Golden sets and their outcomes in the registry's database, where every server that shares it finds them.

    golden_sets         one row an adapter: the set, which server runs it now, the verdict that was announced last
    golden_outcomes     one row a version and case: the latest answer and score, and the first score
    golden_runs         one row a run: when, why, and the score of the version after it
    golden_promotions   one row an adapter at most: a version that becomes live when its score is good enough

A version is known by its bytes, a case by its digest: an outcome holds as long as both are the same. All methods block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    RowMapping,
    ScalarSelect,
    Select,
    delete,
    func,
    insert,
    select,
    update,
)

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import golden_outcomes, golden_promotions, golden_runs, golden_sets, names
from serve.adapters.registry.work_table import Claims
from serve.names import shown
from serve.rollout.golden.golden_scoring import Estimate, Result
from serve.rollout.golden.golden_set import GoldenSet

# What is kept of an answer; and of one adapter: runs, and versions with outcomes.
ANSWER_CHARS = 4000
RUNS_KEPT = 200
VERSIONS_KEPT = 20


@dataclass(frozen=True, slots=True)
class SetRow:
    """A golden set without its document."""

    name: str
    digest: str
    who: str
    when: float
    stamp: int
    verdict: str
    # The id of the key that put it; "" on a server without keys, and of sets that earlier releases kept.
    key: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a version answered to a case. `first_score` is of its first run, `score` of the last one."""

    case: str
    basis: str
    result: Result
    score: float | None
    answer: str = ""
    detail: str = ""
    first_score: float | None = None
    runs: int = 1
    changed: int = 0
    when: float = 0.0


@dataclass(frozen=True, slots=True)
class HeldPromotion:
    """A version that waits for its score."""

    name: str
    version: int
    who: str
    why: str


class _SetClaims(Claims[str]):
    """Which server runs an adapter's set; its digest."""

    table = golden_sets

    def _rows(self) -> Select[Any]:
        return select(golden_sets.c.digest)

    def _is(self, name: str) -> ColumnElement[bool]:
        return golden_sets.c.name_id == _named(name)

    def _read(self, row: Row[Any]) -> str:
        return str(row.digest)


class GoldenStore:
    """`clock` is the time of day, in seconds; `me` this server's name among those that share the registry."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time, *, me: str = "") -> None:
        self.me = me
        self._registry = registry
        self.clock = clock

    # Sets

    def put(self, name: str, golden: GoldenSet, by: str, key: str = "") -> None:
        """Keep the set in the place of the adapter's earlier one; outcomes of cases that are gone go too.

        The key with the id `key` is charged for the runs that nobody asks for.
        """
        row = {"digest": golden.digest, "document": golden.encoded().decode(), "who": shown(by, 256), "key": key}
        with self._registry.transaction() as connection:
            id = _id(connection, name)
            stamp = connection.scalar(select(golden_sets.c.stamp).where(golden_sets.c.name_id == id))
            connection.execute(delete(golden_sets).where(golden_sets.c.name_id == id))
            connection.execute(insert(golden_sets).values(name_id=id, when=self.clock(), stamp=(stamp or 0) + 1, **row))
            kept = golden_outcomes.c.case.in_(list(golden.by_key))
            connection.execute(delete(golden_outcomes).where(golden_outcomes.c.name_id == id, ~kept))

    def get(self, name: str) -> tuple[SetRow, GoldenSet] | None:
        """The adapter's set, if it has one."""
        query = select(golden_sets, names.c.name).join(names).where(names.c.name == name)
        with self._registry.reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else (_set_row(row), GoldenSet.decoded(row.document))

    def sets(self) -> dict[str, SetRow]:
        """Every adapter with a set, without the documents."""
        columns = [column for column in golden_sets.c if column.name != "document"]
        with self._registry.reading() as connection:
            rows = connection.execute(select(*columns, names.c.name).join(names)).all()
        return {row.name: _set_row(row) for row in rows}

    def remove(self, name: str) -> bool:
        """Forget the adapter's set and all that was answered to it; whether there was one."""
        with self._registry.transaction() as connection:
            id = _id(connection, name)
            for table in (golden_outcomes, golden_runs, golden_promotions):
                connection.execute(delete(table).where(table.c.name_id == id))
            return connection.execute(delete(golden_sets).where(golden_sets.c.name_id == id)).rowcount > 0

    def forget(self, name: str, digests: Collection[str]) -> None:
        """Versions of these bytes are gone."""
        with self._registry.transaction() as connection:
            for table in (golden_outcomes, golden_runs):
                where = (table.c.name_id == _named(name)) & table.c.digest.in_(list(digests))
                connection.execute(delete(table).where(where))

    # Who runs it

    def claim(self, name: str, by: str, seconds: float) -> bool:
        """Take the set for this server alone, for so long; again while it has it. False if another one runs it."""
        return self._claims(by).claim(name, seconds) is not None

    def release(self, name: str, by: str) -> None:
        """The end of a claim."""
        self._claims(by).release(name)

    def _claims(self, by: str) -> _SetClaims:
        return _SetClaims(self._registry, me=by, clock=self.clock)

    def announce(self, name: str, verdict: str) -> None:
        """Note the verdict that was announced."""
        with self._registry.transaction() as connection:
            where = golden_sets.c.name_id == _named(name)
            connection.execute(update(golden_sets).where(where).values(verdict=verdict))

    # Outcomes

    def outcomes(self, name: str, digest: str, *, answers: bool = False) -> dict[str, Outcome]:
        """How the version of these bytes did, by case; what it answered only with `answers`."""
        here = golden_outcomes
        left_out = () if answers else ("answer", "detail")
        columns = [column for column in here.c if column.name not in left_out]
        query = select(*columns).where(here.c.name_id == _named(name), here.c.digest == digest)
        with self._registry.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return {row["case"]: _outcome(row) for row in rows}

    def digests(self, name: str) -> list[str]:
        """The bytes of the versions that have outcomes, those that were asked last first."""
        here = golden_outcomes
        query = select(here.c.digest).where(here.c.name_id == _named(name)).group_by(here.c.digest)
        with self._registry.reading() as connection:
            return list(connection.scalars(query.order_by(func.max(here.c.when).desc())))

    def prune(self, name: str, serving: Collection[str]) -> None:
        """Keep outcomes of the versions that were asked last, and of these bytes."""
        old = [digest for digest in self.digests(name)[VERSIONS_KEPT:] if digest not in serving]
        if old:
            where = (golden_outcomes.c.name_id == _named(name)) & golden_outcomes.c.digest.in_(old)
            with self._registry.transaction() as connection:
                connection.execute(delete(golden_outcomes).where(where))

    def record(self, name: str, digest: str, outcomes: Iterable[Outcome], sampled: Collection[str] = ()) -> None:
        """Keep new outcomes; of a case among `sampled` the score becomes the mean over its runs."""
        here = golden_outcomes
        with self._registry.transaction() as connection:
            id = _id(connection, name)
            stamped = update(golden_sets).where(golden_sets.c.name_id == id).values(stamp=golden_sets.c.stamp + 1)
            if not connection.execute(stamped).rowcount:
                return  # the set was removed meanwhile
            for outcome in outcomes:
                where = (here.c.name_id == id) & (here.c.digest == digest) & (here.c.case == outcome.case)
                row = connection.execute(select(here).where(where)).mappings().first()
                values = _merged(outcome, _outcome(row) if row else None, outcome.case in sampled)
                connection.execute(delete(here).where(where))
                connection.execute(insert(here).values(name_id=id, digest=digest, when=self.clock(), **values))

    # Runs

    def add_run(self, adapter: Adapter, set_digest: str, reason: str, began: float, asked: int, now: Estimate) -> None:
        """A run has ended; `now` is the version's score after it."""
        with self._registry.transaction() as connection:
            id = _id(connection, adapter.name)
            connection.execute(
                insert(golden_runs).values(
                    name_id=id,
                    version=adapter.version,
                    digest=adapter.digest,
                    set=set_digest,
                    reason=reason,
                    began=began,
                    ended=self.clock(),
                    asked=asked,
                    cases=now.cases,
                    score=now.score,
                    low=now.low,
                    high=now.high,
                )
            )
            ids = select(golden_runs.c.id).where(golden_runs.c.name_id == id).order_by(golden_runs.c.id.desc())
            old = connection.scalar(ids.offset(RUNS_KEPT).limit(1))
            if old is not None:
                connection.execute(delete(golden_runs).where(golden_runs.c.name_id == id, golden_runs.c.id <= old))

    def runs(self, name: str) -> list[dict[str, Any]]:
        """The latest runs of an adapter's versions, the last one first."""
        query = select(golden_runs).where(golden_runs.c.name_id == _named(name)).order_by(golden_runs.c.id.desc())
        with self._registry.reading() as connection:
            rows = connection.execute(query.limit(RUNS_KEPT)).mappings().all()
        return [{key: value for key, value in row.items() if key not in ("id", "name_id")} for row in rows]

    # Promotions that wait for a score

    def hold(self, adapter: Adapter, by: str, why: str) -> None:
        """The version is to become live once its score is good enough, in the place of one that was to before."""
        with self._registry.transaction() as connection:
            id = _id(connection, adapter.name)
            connection.execute(delete(golden_promotions).where(golden_promotions.c.name_id == id))
            row = {"who": shown(by, 256), "why": shown(why, 2000), "when": self.clock()}
            connection.execute(insert(golden_promotions).values(name_id=id, version=adapter.version, **row))

    def held(self) -> list[HeldPromotion]:
        """Every version that waits."""
        with self._registry.reading() as connection:
            rows = connection.execute(select(golden_promotions, names.c.name).join(names)).all()
        return [HeldPromotion(row.name, row.version, row.who, row.why) for row in rows]

    def settle(self, promotion: HeldPromotion) -> None:
        """It waits no more."""
        here = golden_promotions
        where = (here.c.name_id == _named(promotion.name)) & (here.c.version == promotion.version)
        with self._registry.transaction() as connection:
            connection.execute(delete(here).where(where))


def _named(name: str) -> ScalarSelect[Any]:
    return select(names.c.id).where(names.c.name == name).scalar_subquery()


def _id(connection: Connection, name: str) -> int | None:
    return connection.scalar(select(names.c.id).where(names.c.name == name))


def _set_row(row: Any) -> SetRow:
    return SetRow(row.name, row.digest, row.who, row.when, row.stamp, row.verdict or "", row.key or "")


def _outcome(row: RowMapping) -> Outcome:
    fields = {name: row[name] for name in Outcome.__slots__ if name in row}
    return Outcome(**{**fields, "result": Result(row["result"])})


def _merged(new: Outcome, old: Outcome | None, sampled: bool) -> dict[str, Any]:
    """The row after another run of a case. A run without a score leaves an earlier score as it was."""
    if old is None or old.basis != new.basis or old.score is None:
        return _values(new, new.score, new.score, 1, 0, new.answer)
    if new.score is None:
        return _values(old, old.score, old.first_score, old.runs, old.changed, old.answer) | {"detail": new.detail}
    answer = _storable(new.answer)
    mean = (old.score * old.runs + new.score) / (old.runs + 1) if sampled else new.score
    return _values(new, mean, old.first_score, old.runs + 1, old.changed + (answer != old.answer), answer)


def _values(
    outcome: Outcome, score: float | None, first: float | None, runs: int, changed: int, answer: str
) -> dict[str, Any]:
    return {
        "case": outcome.case,
        "basis": outcome.basis,
        "result": outcome.result.value,
        "score": score,
        "first_score": first,
        "runs": runs,
        "changed": changed,
        "answer": _storable(answer),
        "detail": outcome.detail,
    }


def _storable(answer: str) -> str:
    """Its beginning, without what PostgreSQL takes in no text."""
    return answer[:ANSWER_CHARS].encode("utf-8", "replace").decode().replace("\0", "")
