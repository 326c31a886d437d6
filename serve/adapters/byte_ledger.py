"""The bytes that each tenant has on this server's disk, reserved before they are written: one place for every door.

    room = ledger.room(tenant, Kind.FILES)
    room.expect(stated)           QuotaExceeded or OutOfSpace, before a byte came
    room.take(len(piece))         before each piece is written; the same errors
    room.close()                  it is gone, or it has a row that is counted instead

What has rows elsewhere (versions, files) is asked there; what has none (answers, training, text, baselines) is counted
again from the disk when the server starts. Where the disk comes to its reserve, a tenant with less than its share may
still write: the reserve is there for those who did not fill the disk.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serve.errors import OutOfSpace, QuotaExceeded
from serve.names import shown

# Bytes that are reserved at a time where nobody said how many are coming.
STEP = 1 << 20
# The part of the reserve that nobody may write into, also with less than a share.
_LAST = 4


class Kind(StrEnum):
    """What the bytes are."""

    ADAPTERS = "adapters"  # versions
    UPLOADS = "uploads"  # adapters on their way in
    UNPACKED = "unpacked"  # what archives and shards of those become
    FILES = "files"  # of batches and fine-tuning jobs, also on their way in
    ANSWERS = "answers"  # of batches that are not at their end
    TRAINING = "training"  # checkpoints and results of fine-tuning jobs that are not at their end
    DATASETS = "datasets"  # while they are built; then they are files
    CAPTURED = "captured"  # requests to learn from
    TEXT = "text"  # requests as text, to calibrate on
    BASELINES = "baselines"  # what versions are watched against


# By tenant: of this one, or of all.
Kept = Callable[[str | None], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a tenant's bytes of these kinds may be together; `what` and `advice` are for the sentence."""

    kinds: frozenset[Kind]
    nbytes: int
    what: str
    advice: str
    code: str = "byte_limit_exceeded"


class Room:
    """Bytes of one tenant that are reserved until it is closed. From any thread."""

    def __init__(self, ledger: ByteLedger, tenant: str, kind: Kind, quota: int | None) -> None:
        self.tenant = tenant
        self.kind = kind
        self.quota = quota
        self.reserved = self.written = 0
        self._ledger = ledger
        self._others: list[Room] = []
        self._closed = False
        self._lock = threading.Lock()

    def expect(self, nbytes: int) -> None:
        """So many are coming, or none of them; QuotaExceeded or OutOfSpace, if there is no room for them."""
        with self._lock:
            self._check_open()
            self._ledger.grow(self, nbytes)

    def take(self, nbytes: int) -> None:
        """So many more are about to be written; QuotaExceeded or OutOfSpace, if there is no room for them."""
        with self._lock:
            if (more := self.written + nbytes - self.reserved) > 0:
                self._grow(more)
            self.written += nbytes

    def give_back(self, nbytes: int) -> None:
        """So many were not written after all, or are gone."""
        with self._lock:
            self.written -= nbytes
            self._ledger.move(self, self.written)

    def taken(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, each taken before it is handed on, whatever the bounds say: what they are made of is on the
        disk already, and goes."""
        for piece in pieces:
            self.count(self.written + len(piece))
            yield piece

    def count(self, nbytes: int) -> int:
        """So much is on the disk, whatever the bounds say; how much more than before that is."""
        with self._lock:
            more, self.written = nbytes - self.written, nbytes
            self._ledger.move(self, nbytes)
            return more

    def measure(self, nbytes: int) -> None:
        """As `count`, of what another program wrote; QuotaExceeded or OutOfSpace, if it should write no more."""
        if self.count(nbytes) > 0:
            self._ledger.check(self.tenant, self.kind, quota=self.quota)

    def beside(self, kind: Kind) -> Room:
        """Room for bytes of another kind, which is closed with this one."""
        other = self._ledger.room(self.tenant, kind, quota=self.quota)
        self._others.append(other)
        return other

    def close(self) -> None:
        for other in self._others:
            other.close()
        with self._lock:
            self._closed, self.written = True, 0
            self._ledger.move(self, 0, closed=True)

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grow(self, more: int) -> None:
        self._check_open()
        if 0 < more < STEP:
            with suppress(QuotaExceeded, OutOfSpace):  # there may be less room than a step
                return self._ledger.grow(self, STEP)
        return self._ledger.grow(self, more)

    def _check_open(self) -> None:
        if self._closed:  # whoever takes goes on in a thread that nobody waits for any more
            raise RuntimeError("the room is closed")


class Rooms:
    """Rooms of one kind that last longer than a call, each by what it is for. From any thread."""

    def __init__(self, ledger: ByteLedger, kind: Kind) -> None:
        self._ledger = ledger
        self._kind = kind
        self._rooms: dict[str, Room] = {}
        self._lock = threading.Lock()

    @property
    def ids(self) -> set[str]:
        """What there are some for."""
        with self._lock:
            return set(self._rooms)

    def of(self, id: str, tenant: str) -> Room:
        """The one for this, which is empty at first."""
        with self._lock:
            if id not in self._rooms:
                self._rooms[id] = self._ledger.room(tenant, self._kind)
            return self._rooms[id]

    def close(self, id: str) -> None:
        """What it was for is gone, or has a row that is counted instead."""
        with self._lock:
            room = self._rooms.pop(id, None)
        if room is not None:
            room.close()


class ByteLedger:
    """`reserve` is what the disk of `root` keeps free; `free` says how much it has."""

    def __init__(
        self,
        root: Path,
        *,
        reserve: int = 256 << 20,
        free: Callable[[Path], int] = lambda root: shutil.disk_usage(root).free,
    ) -> None:
        self._root = root
        self.reserve = reserve
        self._free = free
        self._bounds: list[Bound] = []
        self._kept: dict[Kind, Kept] = {}
        self._reserved: Counter[tuple[str, Kind]] = Counter()
        self._rooms: set[Room] = set()
        self._counting = threading.Lock()
        # A tenant's bytes are checked and reserved in one step; others do not wait for its rows.
        self._turns: dict[str, threading.Lock] = {}

    def bound(self, *bounds: Bound) -> None:
        """Hold tenants to these too."""
        self._bounds += bounds

    def counts(self, kind: Kind, kept: Kept) -> None:
        """Bytes of this kind that have rows."""
        self._kept[kind] = kept

    def room(self, tenant: str, kind: Kind, *, quota: int | None = None) -> Room:
        """An empty one, for what is coming. `quota`: what a key lets all rooms of its kind take."""
        room = Room(self, tenant, kind, quota)
        with self._counting:
            self._rooms.add(room)
        return room

    def check(self, tenant: str, kind: Kind, more: int = 0, *, quota: int | None = None) -> None:
        """The errors of a room that would have to take so many more."""
        with self._turn(tenant):
            self._check(tenant, kind, more, quota)

    def grow(self, room: Room, more: int) -> None:
        """Of rooms alone."""
        with self._turn(room.tenant):
            self._check(room.tenant, room.kind, more, room.quota)
            with self._counting:
                room.reserved += more
                self._reserved[room.tenant, room.kind] += more

    def move(self, room: Room, reserved: int, *, closed: bool = False) -> None:
        """Of rooms alone."""
        with self._counting:
            self._reserved[room.tenant, room.kind] += reserved - room.reserved
            room.reserved = reserved
            if not self._reserved[room.tenant, room.kind]:
                del self._reserved[room.tenant, room.kind]
            if closed:
                self._rooms.discard(room)

    def nbytes(self, tenant: str, *kinds: Kind) -> int:
        """What the tenant has of these kinds, reserved bytes too; of all, if none is named."""
        kinds = kinds or tuple(Kind)
        kept = sum(self._kept[kind](tenant).get(tenant, 0) for kind in kinds if kind in self._kept)
        with self._counting:
            return kept + sum(self._reserved[tenant, kind] for kind in kinds)

    def totals(self) -> dict[str, dict[str, int]]:
        """Bytes by tenant and kind."""
        totals: dict[str, dict[str, int]] = {}
        with self._counting:
            found = [(tenant, kind, nbytes) for (tenant, kind), nbytes in self._reserved.items()]
        for kind, kept in self._kept.items():
            found += [(tenant, kind, nbytes) for tenant, nbytes in kept(None).items()]
        for tenant, kind, nbytes in found:
            kinds = totals.setdefault(tenant, {})
            kinds[kind.value] = kinds.get(kind.value, 0) + nbytes
        return totals

    def _check(self, tenant: str, kind: Kind, more: int, quota: int | None) -> None:
        if quota is not None:
            with self._counting:
                under_way = self._reserved[tenant, kind]
            if under_way + more > quota:
                raise QuotaExceeded(
                    f"this tenant's {kind} under way take {under_way} bytes, {more} more pass the {quota} that this "
                    "key may let them take: wait until they have ended, or send a smaller one",
                    code="byte_limit_exceeded",
                )
        for bound in self._bounds:
            if kind in bound.kinds and (has := self.nbytes(tenant, *bound.kinds)) + more > bound.nbytes:
                raise QuotaExceeded(
                    f"this tenant's {bound.what} have {has} bytes, {more} more pass its {bound.nbytes}: {bound.advice}",
                    code=bound.code,
                )
        self.check_disk(tenant, more)

    def check_disk(self, tenant: str, more: int = 0) -> None:
        """OutOfSpace, if the disk has no room for so much more of this tenant's."""
        free = self._free(self._root)
        with self._counting:
            promised = sum(room.reserved - room.written for room in self._rooms)
        if free - promised - more >= self.reserve:
            return
        if free - more >= self.reserve // _LAST and self._has_less_than_its_share(tenant, more):
            return
        raise OutOfSpace(
            f"the disk has {free >> 20} MiB free, and {more >> 20} MiB more for {shown(tenant)} would leave less than "
            f"the reserve of {self.reserve >> 20} MiB; delete adapters or make room, then send it again"
        )

    @property
    def problem(self) -> str:
        """Why more may be refused, for a person; "" as long as the disk has its reserve. Blocks."""
        free = self._free(self._root)
        if free >= self.reserve:
            return ""
        return (
            f"the disk has {free >> 20} MiB free, less than the reserve of {self.reserve >> 20} MiB: pushes and files "
            "are refused, and answers of batches wait; delete adapters or make room"
        )

    def _has_less_than_its_share(self, tenant: str, more: int) -> bool:
        totals = {name: sum(kinds.values()) for name, kinds in self.totals().items()}
        totals[tenant] = totals.get(tenant, 0) + more
        return totals[tenant] * len(totals) < sum(totals.values())

    @contextmanager
    def _turn(self, tenant: str) -> Iterator[None]:
        with self._counting:
            turn = self._turns.setdefault(tenant, threading.Lock())
        with turn:
            yield


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, of those that are there still."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
