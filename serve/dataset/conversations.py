"""Requests that adapters may learn from: what was asked, what was answered, and what people said of the answer.

Kept only of adapters and bases whose policy says `train_on_traffic`, in a database of this server's own (SQLite), with
what `redact` matches blacked out, until `hours` after they came or until somebody deletes the conversation.

Clients send a conversation whole with each turn. A request goes on with the one whose messages and answer it repeats,
else with the last one whose messages of the user's it repeats; and a client that changes those begins a new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.adapters.byte_ledger import ByteLedger, Kind
from serve.asgi.exchange import Exchange
from serve.dataset.asked_text import Asked, NoText, asked_text
from serve.dataset.feedback import bare_id, named_by
from serve.errors import NotFound, OutOfSpace, QuotaExceeded
from serve.files import write_ahead
from serve.names import shown

HOUR = 3600
# What a tenant's requests of one hour may take.
HOUR_BYTES = 16 << 20
_PATIENCE = 30.0  # seconds that one writer waits for another
_SCHEMA = """
create table if not exists requests (
    tenant text not null, id text not null, adapter text not null, version text not null, moment real not null,
    asker text not null, conversation text not null, whole text not null, users text not null,
    asked text not null, answer text not null, finish text not null, nbytes integer not null,
    rating real, correction text, client_id text not null default '', key text not null default '',
    primary key (tenant, id)
);
create index if not exists by_moment on requests (moment);
create index if not exists by_conversation on requests (tenant, conversation);
create index if not exists by_whole on requests (tenant, whole);
create index if not exists by_users on requests (tenant, users);
create table if not exists left_out (
    tenant text not null, adapter text not null, hour integer not null, reason text not null, count integer not null,
    primary key (tenant, adapter, hour, reason)
);
"""
# What a database of an earlier release has not.
_LATER = ("client_id", "key")
# By name: a later release may have given the table more columns, and this one may follow it.
_INSERT = (
    "insert or ignore into requests (tenant, id, adapter, version, moment, asker, conversation, whole, users, asked, "
    "answer, finish, nbytes, client_id, key) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_COLUMNS = "id, tenant, adapter, version, moment, asker, conversation, asked, answer, finish, rating, correction"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Captured:
    """One answered request. `asked` is a prompt, or messages with their role and text; `finish` is why the answer ends.

    `rating` is from 0 to 1, `correction` what the answer should have been; None while nobody said so.
    """

    id: str
    tenant: str
    adapter: str
    version: str
    moment: float
    asker: str
    conversation: str
    asked: Asked
    answer: str
    finish: str
    rating: float | None = None
    correction: str | None = None


class Conversations:
    """An observer of an exchange worker; every other method blocks, and may be called from any thread.

    `learns(adapter, tenant)` says whether a request of this tenant's to this adapter or base is kept. Without `enabled`
    none is, and what is there is still deleted in time.
    """

    def __init__(
        self,
        file: Path,
        ledger: ByteLedger | None = None,
        learns: Callable[[str, str], bool] = lambda adapter, tenant: True,
        *,
        enabled: bool = True,
        redact: Sequence[str] = (),
        hours: float = 24.0,
        limit: int = HOUR_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._learns = learns
        self._enabled = enabled
        self._redact = [re.compile(pattern) for pattern in redact]
        self._hours = hours
        self._limit = limit
        self._clock = clock
        self._writing = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        # The bytes of this hour, by tenant.
        self._hour, self._sizes = 0, dict[str, int]()
        # All that is here, by tenant.
        self._kept: dict[str, int] = {}
        self._ledger = ledger
        if ledger is not None:
            ledger.counts(Kind.CAPTURED, lambda tenant: self._kept)

    def start(self) -> None:
        """Make the database, readable by its owner alone, and delete old rows."""
        if self._enabled:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
        self.save()
        self._recount()

    def observe(self, exchange: Exchange) -> None:
        """Keep one answered request, if its adapter learns."""
        if not self._enabled or exchange.status != 200 or not exchange.generations:
            return
        if not self._learns(exchange.adapter, exchange.tenant):
            return
        try:
            self._keep(exchange)
        except (OSError, sqlite3.Error, OutOfSpace) as error:  # a full disk: traffic goes on
            log.warning("a request was not kept to learn from: %s", error)

    def looked(self) -> None:
        """Every request is written by itself."""

    def save(self) -> None:
        """Delete what is too old."""
        if not self._file.exists():
            return
        before = self._clock() - self._hours * HOUR
        with self._changing() as database:
            gone = database.execute("delete from requests where moment < ?", (before,)).rowcount
            database.execute("delete from left_out where hour < ?", (int(before // HOUR),))
        if gone:
            self._wipe()
            self._recount()

    def stop(self) -> None:
        """Every row is on the disk already."""
        with self._writing:
            if self._writer:
                self._writer.close()
            self._writer = None

    def rate(self, tenant: str, key: str, id: str, rating: float | None, correction: str | None) -> bool:
        """Note what somebody said of an answer, once; whether such a request is kept and nothing was said of it yet.

        `key` is the id of the API key of whoever says so, which a client's own id for a request is looked up by.
        """
        if not self._file.exists():
            return False
        correction = self._redacted(correction) if correction is not None else None
        with self._changing() as database:
            own = _found(database, tenant, key, id)
            where = "tenant = ? and id = ? and rating is null and correction is null"
            values = (rating, correction, tenant, own)
            return bool(
                database.execute(f"update requests set rating = ?, correction = ? where {where}", values).rowcount
            )

    def rows(
        self, tenant: str, adapters: Collection[str], since: float = 0.0, until: float | None = None
    ) -> Iterator[Captured]:
        """The requests of a tenant to these adapters or bases from `since` to before `until`, the latest first."""
        where, values = _within(tenant, adapters, "moment", since, until)
        with self._reading() as database:
            for row in database.execute(
                f"select {_COLUMNS} from requests where {where} order by moment desc, id", values
            ):
                yield _captured(row)

    def left_out(
        self, tenant: str, adapters: Collection[str], since: float = 0.0, until: float | None = None
    ) -> dict[str, int]:
        """How many were not kept in these hours, by reason."""
        end = None if until is None else until / HOUR
        where, values = _within(tenant, adapters, "hour", since // HOUR, end)
        with self._reading() as database:
            query = f"select reason, sum(count) from left_out where {where} group by reason order by reason"
            return {reason: int(count) for reason, count in database.execute(query, values)}

    def listed(self, tenant: str, adapters: Collection[str], limit: int = 100) -> list[dict[str, Any]]:
        """The latest conversations: ids, numbers and times, and no text."""
        where, values = _within(tenant, adapters, "moment", 0.0, None)
        query = (
            "select conversation, count(*), min(moment), max(moment), count(rating), count(correction), "
            f"group_concat(id) from requests where {where} group by conversation order by max(moment) desc, "
            "conversation limit ?"
        )
        with self._reading() as database:
            return [
                {
                    "id": id, "object": "data.conversation", "requests": count, "began": int(began),
                    "last": int(last), "rated": rated, "corrected": corrected, "request_ids": sorted(ids.split(",")),
                }
                for id, count, began, last, rated, corrected, ids in database.execute(query, (*values, limit))
            ]  # fmt: skip

    def forget(
        self,
        tenant: str,
        key: str,
        adapters: Collection[str],
        id: str,
        note: Callable[[str, Sequence[Captured]], None] = lambda tenant, gone: None,
    ) -> tuple[str, list[Captured]]:
        """Delete the conversation of this id, or that of this answer; its id, and its requests. NotFound.

        `note` is told what is about to be deleted; if it fails nothing is.
        """
        if not self._file.exists():
            raise _missing(id)
        where, values = _within(tenant, adapters, "moment", 0.0, None)
        with self._changing() as database:
            row = database.execute(
                f"select conversation from requests where {where} and (conversation = ? or id = ?)",
                (*values, id, _found(database, tenant, key, id)),
            ).fetchone()
            if row is None:
                raise _missing(id)
            # All of it, also what it said to other adapters.
            place = "tenant = ? and conversation = ?"
            query = f"select {_COLUMNS} from requests where {place} order by id"
            gone = [_captured(there) for there in database.execute(query, (tenant, row[0]))]
            note(tenant, gone)
            database.execute(f"delete from requests where {place}", (tenant, row[0]))
        self._wipe()
        return str(row[0]), gone

    def remove(
        self,
        tenant: str,
        which: Callable[[Captured], bool],
        note: Callable[[str, Sequence[Captured]], None] = lambda tenant, gone: None,
    ) -> list[Captured]:
        """Delete those of a tenant's requests, asked from the earliest on; what they were. `note` is as `forget`
        takes it."""
        if not self._file.exists():
            return []
        with self._changing() as database:
            query = f"select {_COLUMNS} from requests where tenant = ? order by moment, id"
            gone = [captured for captured in map(_captured, database.execute(query, (tenant,))) if which(captured)]
            if gone:
                note(tenant, gone)
            ids = [(tenant, captured.id) for captured in gone]
            database.executemany("delete from requests where tenant = ? and id = ?", ids)
        if gone:
            self._wipe()
        return gone

    @property
    def last_deletion(self) -> int:
        """The number of the last deletion of the registry that was applied here, also before a restart."""
        with self._reading() as database:
            return int(database.execute("pragma user_version").fetchone()[0])

    def note_deletion(self, number: int) -> None:
        """All deletions up to this one are applied here."""
        if self._file.exists():
            with self._changing() as database:
                database.execute(f"pragma user_version = {number}")

    def _keep(self, exchange: Exchange) -> None:
        now = self._clock()
        generation, *others = exchange.generations
        if not generation.text:
            return  # embeddings, scores
        if others:
            self._leave_out(exchange, now, "several_answers")
            return
        asked = asked_text(exchange.question)
        if isinstance(asked, NoText):
            self._leave_out(exchange, now, asked.value)
            return
        text = self._redacted(asked) if isinstance(asked, str) else [self._message(message) for message in asked]
        answer = self._redacted(generation.text)
        row = json.dumps(text, ensure_ascii=False)
        nbytes = len(row.encode()) + len(answer.encode())
        whole, users, earlier = _chain(text, answer)
        asker = hashlib.blake2b(exchange.asker or exchange.request_id.encode(), digest_size=12).hexdigest()
        try:
            if self._ledger is not None:
                self._ledger.check(exchange.tenant, Kind.CAPTURED, nbytes)
        except (QuotaExceeded, OutOfSpace):
            self._leave_out(exchange, now, "no_room")
            return
        with self._changing() as database:
            if self._full(database, exchange.tenant, now, nbytes):
                self._count(database, exchange, now, "hour_full")
                return
            conversation = _conversation(database, exchange.tenant, asker, earlier) or _fresh_id(exchange)
            known = (exchange.tenant, exchange.request_id, exchange.adapter, exchange.version, now, asker, conversation)
            database.execute(
                _INSERT,
                (*known, whole, users, row, answer, generation.finish_reason, nbytes, exchange.client_id, exchange.key),
            )
        for sizes in (self._sizes, self._kept):
            sizes[exchange.tenant] = sizes.get(exchange.tenant, 0) + nbytes

    def _full(self, database: sqlite3.Connection, tenant: str, now: float, nbytes: int) -> bool:
        """Whether the tenant's hour has no room for so many bytes."""
        hour = int(now // HOUR)
        if hour != self._hour:
            self._hour, self._sizes = hour, {}
        if tenant not in self._sizes:
            query = "select coalesce(sum(nbytes), 0) from requests where tenant = ? and moment >= ?"
            self._sizes[tenant] = database.execute(query, (tenant, hour * HOUR)).fetchone()[0]
        return self._sizes[tenant] + nbytes > self._limit

    def _recount(self) -> None:
        """From the disk."""
        with self._reading() as database:
            query = "select tenant, sum(nbytes) from requests group by tenant"
            self._kept = {tenant: int(nbytes) for tenant, nbytes in database.execute(query)}

    def _leave_out(self, exchange: Exchange, now: float, reason: str) -> None:
        with self._changing() as database:
            self._count(database, exchange, now, reason)

    @staticmethod
    def _count(database: sqlite3.Connection, exchange: Exchange, now: float, reason: str) -> None:
        database.execute(
            "insert into left_out values (?, ?, ?, ?, 1) on conflict do update set count = count + 1",
            (exchange.tenant, exchange.adapter, int(now // HOUR), reason),
        )

    def _message(self, message: Mapping[str, str]) -> dict[str, str]:
        return {"role": message["role"], "content": self._redacted(message["content"])}

    def _redacted(self, text: str) -> str:
        # A lone surrogate is no text that a database or a file takes.
        text = text.encode("utf-8", "replace").decode()
        for pattern in self._redact:
            text = pattern.sub("[redacted]", text)
        return text

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, one writer of this process at a time; OutOfSpace."""
        with self._writing:
            try:
                self._writer = self._writer or self._open()
                with self._writer as database:
                    yield database
            except (sqlite3.OperationalError, OSError) as wrong:
                if not _is_full(wrong):
                    raise
                raise OutOfSpace(
                    f"what is captured cannot be changed ({wrong}): make room on the disk, then try again"
                ) from wrong

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if not self._file.exists():
            with closing(sqlite3.connect(":memory:")) as empty:
                empty.executescript(_SCHEMA)
                yield empty
            return
        with closing(self._open()) as database:
            yield database

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._file, timeout=_PATIENCE, check_same_thread=False)
        write_ahead(database, _PATIENCE)  # a build reads while traffic writes
        # What is deleted is overwritten.
        database.executescript("pragma synchronous=normal; pragma secure_delete=on;" + _SCHEMA)
        there = {row[1] for row in database.execute("pragma table_info(requests)")}
        for column in (name for name in _LATER if name not in there):
            database.execute(f"alter table requests add column {column} text not null default ''")
        database.execute("create index if not exists by_client_id on requests (tenant, client_id)")
        database.commit()
        return database

    def _wipe(self) -> None:
        """Take what was deleted out of the log of changes too."""
        with self._changing() as database:
            database.execute("pragma wal_checkpoint(truncate)")


def _found(database: sqlite3.Connection, tenant: str, key: str, id: str) -> str | None:
    """The server's id of the request that `id` means to whoever has this key (see `feedback`)."""
    own = "select id from requests where tenant = ? and id in (?, ?)"
    if row := database.execute(own, (tenant, id, bare_id(id))).fetchone():
        return str(row[0])
    # Of the columns beside a maximum SQLite gives those of its row.
    latest = "select key, id, max(moment) from requests where tenant = ? and client_id = ? group by key"
    return named_by(key, {key: own for key, own, _ in database.execute(latest, (tenant, id))} if id else {})


def _is_full(wrong: sqlite3.OperationalError | OSError) -> bool:
    """The disk is full; SQLite also says that it cannot read or write then."""
    if isinstance(wrong, OSError):
        return wrong.errno in (errno.ENOSPC, errno.EDQUOT)
    return wrong.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _missing(id: str) -> NotFound:
    return NotFound(
        f"no conversation of this adapter is kept with the id {shown(id)}: take one of the list, or the id of one of "
        "its answers",
        param="id",
    )


def _within(
    tenant: str, adapters: Collection[str], column: str, since: float, until: float | None
) -> tuple[str, tuple[Any, ...]]:
    names = ", ".join("?" * len(adapters))
    where = f"tenant = ? and adapter in ({names}) and {column} >= ?"
    values: tuple[Any, ...] = (tenant, *adapters, since)
    return (where, values) if until is None else (f"{where} and {column} < ?", (*values, until))


def _captured(row: Sequence[Any]) -> Captured:
    id, tenant, adapter, version, moment, asker, conversation, asked, *rest = row
    return Captured(id, tenant, adapter, version, moment, asker, conversation, json.loads(asked), *rest)


def _chain(asked: Asked, answer: str) -> tuple[str, str, tuple[str, str] | None]:
    """What a request that goes on will repeat, whole and of the user's alone; and what this one repeats, if anything.

    Spaces at the ends count for nothing.
    """
    if isinstance(asked, str):
        return "", "", None
    said = [(message["role"], message["content"].strip()) for message in asked]
    whole = _digest([*said, ("assistant", answer.strip())])
    users = _digest([turn for turn in said if turn[0] == "user"])
    last = max((at for at, (role, _) in enumerate(said) if role == "assistant"), default=None)
    if last is None:
        return whole, users, None
    before = said[: last + 1]
    return whole, users, (_digest(before), _digest([turn for turn in before if turn[0] == "user"]))


def _conversation(database: sqlite3.Connection, tenant: str, asker: str, earlier: tuple[str, str] | None) -> str | None:
    """The conversation that a request with these messages before its last ones goes on with: one of the same asker, if
    there is one. Who asks may be told otherwise by then, as in few-shot chats."""
    whole, users = earlier or ("", "")
    repeated = ("whole = :whole", "users = :users")
    for where in (*(f"{digest} and asker = :asker" for digest in repeated), *repeated):
        query = f"select conversation from requests where tenant = :tenant and {where} order by moment desc, id limit 1"
        known = {"tenant": tenant, "asker": asker, "whole": whole, "users": users}
        if earlier and (row := database.execute(query, known).fetchone()):
            return str(row[0])
    return None


def _fresh_id(exchange: Exchange) -> str:
    named = f"{exchange.tenant}\0{exchange.request_id}\0{exchange.began!r}".encode()
    return f"conv-{hashlib.blake2b(named, digest_size=12).hexdigest()}"


def _digest(said: Sequence[tuple[str, str]]) -> str:
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
