"""The fair queue before an engine: which request it gets next, so that no tenant waits for ever behind another's flood.

An engine has seats (sequences that it works on) and slots (adapters that a batch may hold). By itself it takes requests
in the order of their arrival and skips one whose adapter finds no slot: a tenant's flood would delay everybody, and as
many busy adapters as there are slots would keep all others out.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

# Seats that only a tenant with none may take, as a part of all: one tenant's long answers cannot fill the engine.
RESERVE = 8
# How much later one more request of the same tenant goes first in the engine, in units that a weight divides.
STEP = 16


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place: in the queue until it is seated, then with the engine until `FairQueue.leave` gets it."""

    tenant: str
    adapter: str | None
    weight: float
    priority: int
    number: int
    # Seats that it takes: a request that fans out takes one for each of its sequences.
    size: int = 1
    # Seated before a larger ticket whose turn it was.
    has_passed: bool = False
    # Once seated: among those with the engine, a smaller one is to go first.
    order: int = 0
    start: int = 0
    is_seated: bool = False
    # By the monotonic clock, for those who watch: no decision depends on it.
    entered: float = field(default_factory=time.monotonic)
    _refusal: BaseException | None = field(default=None, repr=False)
    _turn: asyncio.Future[None] | None = field(default=None, repr=False)

    async def wait(self) -> None:
        """Until the seat is given. Whoever gives up waiting must still leave."""
        if self._refusal:
            raise self._refusal
        if not self.is_seated:
            self._turn = asyncio.get_running_loop().create_future()
            await self._turn

    def refuse(self, error: BaseException) -> None:
        """Whoever waits for the seat, now or later, gets `error` instead."""
        self._refusal = error
        if self._turn and not self._turn.done():
            self._turn.set_exception(error)


@dataclass(frozen=True, slots=True)
class Backlog:
    """Tickets that wait, and when the oldest of them came, by the monotonic clock."""

    tickets: int
    oldest: float


Flow = tuple[int, str, str | None]  # priority, tenant, adapter


@dataclass(slots=True)
class _Share:
    """What a tenant, or one adapter of it, has of the engine now, and when it was last given a seat."""

    seats: int = 0
    served: int = 0
    order: int = 0
    granted: int = 0


@dataclass(slots=True)
class _Slot:
    """An adapter's, given for the sake of a tenant; each flow that waited then is owed one turn before it goes."""

    tenant: str
    priority: int
    owed: set[Flow]
    seats: int = 0
    # Takes nobody new: others want the slot, and they get it once this adapter's answers under way have ended.
    leaving: bool = False


_NO_SHARE = _Share()


class FairQueue:
    """Gives out `seats` and `slots`. It promises:

    - No seat stays free while somebody waits who could use it, but for the eighth of them that is kept for tenants
      that have none, and for those that a ticket of several seats waits for when it is next. Meanwhile only tenants
      without a seat pass it, in that eighth, which no such ticket needs: so neither waits for ever.
    - A smaller `priority` goes before a larger one, always. All that follows is among equals.
    - Next is the tenant with the fewest seats for its `weight`, then its adapter with the fewest, then who came first;
      among tenants or adapters that are level, whose last turn is longest ago. The versions of an adapter (NAME@DIGEST)
      have their seats together: a canary and the live version wait alike, however the traffic is split.
    - A ticket waits for a bounded number of others, whatever they do: a tenant without a seat gets the next that is
      free, and an adapter without a slot gets one that another has to give up after its answers under way (who has
      held one longest gives up first; half of the slots at most are being given up at a time). Every tenant that
      waits for an adapter when it gets its slot has a turn before it has to give it up again.
    - `Ticket.order` carries the same fairness into the engine's own queue: as its priority there, smaller first.

    Its decisions know no clock; it has no bound and refuses nobody: `Admission` does, by `waiting` and `busy`. All
    methods but `backlog` are for one event loop; `enter` and `leave` never wait.
    """

    def __init__(self, seats: int, slots: int) -> None:
        self.seats = seats
        self.slots = slots
        self._reserve = max(1, seats // RESERVE) if seats > 1 else 0
        self._numbers = itertools.count(1)
        self._waiting: dict[Flow, dict[int, Ticket]] = {}
        # Of all flows: a plain number, because metrics are read by another thread.
        self._waiting_count = 0
        self._seated: dict[int, Ticket] = {}
        # Seats that are taken; those of tickets that passed a larger one; those that are waited for.
        self._busy = self._passed = 0
        self._wanted: Counter[Flow] = Counter()
        self._tenants: dict[str, _Share] = {}
        self._adapters: dict[tuple[str, str | None], _Share] = {}
        self._slots: dict[str, _Slot] = {}

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return self._waiting_count

    @property
    def busy(self) -> int:
        """Seats that are taken."""
        return self._busy

    def seats_for(self, sequences: int) -> int:
        """Seats that a request of so many sequences takes: all but the reserve at most."""
        return max(1, min(sequences, self.seats - self._reserve))

    def ahead(self, tenant: str, priority: int) -> int:
        """Seats wanted by tickets that go before one more of this tenant: all of a smaller priority, and its own."""
        return sum(
            seats
            for (other, name, _), seats in self._wanted.items()
            if other < priority or (other == priority and name == tenant)
        )

    def has_seat(self, tenant: str) -> bool:
        """The tenant has a seat."""
        share = self._tenants.get(tenant)
        return share is not None and share.seats > 0

    def count_tenants(self, tenant: str) -> int:
        """How many share the seats, this one counted too."""
        seated = (name for name, share in self._tenants.items() if share.seats)
        return len({tenant, *seated, *(name for _, name, _ in self._waiting)})

    def backlog(self, below: int) -> Mapping[tuple[str, str | None], Backlog]:
        """What waits with a priority smaller than `below`, by tenant and adapter; may be called from any thread."""
        backlogs: dict[tuple[str, str | None], Backlog] = {}
        for (priority, tenant, adapter), tickets in list(self._waiting.items()):
            waiting = list(tickets.values())
            if priority < below and waiting:
                known = backlogs.get((tenant, adapter), Backlog(0, waiting[0].entered))
                oldest = min(known.oldest, waiting[0].entered)
                backlogs[tenant, adapter] = Backlog(known.tickets + len(waiting), oldest)
        return backlogs

    @property
    def active(self) -> frozenset[str]:
        """The adapters that hold a slot."""
        return frozenset(self._slots)

    @asynccontextmanager
    async def turn(
        self, tenant: str, adapter: str | None = None, *, weight: float = 1.0, priority: int = 0, size: int = 1
    ) -> AsyncIterator[Ticket]:
        """A seat (and a slot, for an adapter) from its turn until the block ends."""
        ticket = self.enter(tenant, adapter, weight=weight, priority=priority, size=size)
        try:
            await ticket.wait()
            yield ticket
        finally:
            self.leave(ticket)

    def enter(
        self, tenant: str, adapter: str | None = None, *, weight: float = 1.0, priority: int = 0, size: int = 1
    ) -> Ticket:
        """Join the queue; the ticket may be seated at once. `size` is how many sequences it has."""
        ticket = Ticket(tenant, adapter, weight, priority, next(self._numbers), self.seats_for(size))
        flow = (priority, tenant, adapter)
        self._waiting.setdefault(flow, {})[ticket.number] = ticket
        self._wanted[flow] += ticket.size
        self._waiting_count += 1
        self._assign()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the seat back, or the place in the queue; once for each ticket, whatever became of it."""
        if self._seated.pop(ticket.number, None):
            self._unseat(ticket)
        else:
            self._drop(ticket)
        self._assign()

    def _assign(self) -> None:
        """Give out the slots that are free, then the seats; then free slots for adapters that still lack one."""
        self._grant_slots()
        self._free_slots()
        while self._busy < self.seats and (ticket := self._next()):
            self._seat(ticket)
        self._free_slots()

    def _next(self) -> Ticket | None:
        """Who is seated now; nobody, while the next ticket's seats are not free yet."""
        flow = min(filter(self._fits, self._waiting), key=self._rank, default=None)
        if flow is None:
            return None
        ticket = self._first(flow)
        reserve = self._reserve if self.has_seat(ticket.tenant) else 0
        return ticket if self._busy + ticket.size <= self.seats - reserve else self._passing(ticket)

    def _passing(self, larger: Ticket) -> Ticket | None:
        """Who is seated while a larger ticket waits for its seats."""
        room = min(self.seats - self._busy, self._reserve - self._passed)
        flow = min(
            (
                flow
                for flow in filter(self._fits, self._waiting)
                if flow[0] == larger.priority and not self.has_seat(flow[1]) and self._first(flow).size <= room
            ),
            key=self._rank,
            default=None,
        )
        if flow is None:
            return None
        ticket = self._first(flow)
        ticket.has_passed = True
        return ticket

    def _first(self, flow: Flow) -> Ticket:
        return next(iter(self._waiting[flow].values()))

    def _rank(self, flow: Flow) -> tuple[float, ...]:
        """The flow with the smallest rank is served first."""
        priority, tenant, adapter = flow
        of_tenant = self._tenants.get(tenant, _NO_SHARE)
        of_adapter = self._adapters.get((tenant, _name(adapter)), _NO_SHARE)
        first = self._first(flow)
        seats = of_tenant.seats / first.weight
        return (priority, seats, of_tenant.served, of_adapter.seats, of_adapter.served, first.number)

    def _fits(self, flow: Flow) -> bool:
        _, tenant, adapter = flow
        share = self._tenants.get(tenant)
        if share and share.seats and self._busy >= self.seats - self._reserve:
            return False
        if adapter is None:
            return True
        slot = self._slots.get(adapter)
        return slot is not None and (not slot.leaving or flow in slot.owed)

    def _seat(self, ticket: Ticket) -> None:
        self._drop(ticket)
        now = next(self._numbers)
        of_tenant = self._tenants.setdefault(ticket.tenant, _Share())
        of_adapter = self._adapters.setdefault((ticket.tenant, _name(ticket.adapter)), _Share())
        # A tenant's first request comes level with the oldest that the engine has, each further one a step behind; and
        # so does each further sequence of one request, which all have one order: that of the last.
        first = min((seated.start for seated in self._seated.values()), default=0)
        step = max(1, round(STEP / ticket.weight))
        ticket.start = max(first, of_tenant.order + step if of_tenant.seats else 0)
        ticket.order = of_tenant.order = ticket.start + (ticket.size - 1) * step
        self._busy += ticket.size
        self._passed += ticket.size if ticket.has_passed else 0
        for share in (of_tenant, of_adapter):
            share.seats += ticket.size
            share.served = now
        if ticket.adapter is not None:
            slot = self._slots[ticket.adapter]
            slot.seats += ticket.size
            slot.owed.discard((ticket.priority, ticket.tenant, ticket.adapter))
        self._seated[ticket.number] = ticket
        ticket.is_seated = True
        if ticket._turn and not ticket._turn.done():
            ticket._turn.set_result(None)

    def _unseat(self, ticket: Ticket) -> None:
        self._busy -= ticket.size
        self._passed -= ticket.size if ticket.has_passed else 0
        self._tenants[ticket.tenant].seats -= ticket.size
        self._adapters[ticket.tenant, _name(ticket.adapter)].seats -= ticket.size
        if ticket.adapter is not None:
            self._slots[ticket.adapter].seats -= ticket.size
        self._forget()

    def _drop(self, ticket: Ticket) -> None:
        flow = (ticket.priority, ticket.tenant, ticket.adapter)
        tickets = self._waiting.get(flow, {})
        if tickets.pop(ticket.number, None):
            self._waiting_count -= 1
            self._wanted[flow] -= ticket.size
        if not tickets:
            self._waiting.pop(flow, None)
            self._wanted.pop(flow, None)

    def _grant_slots(self) -> None:
        """Give every free slot to an adapter that is waited for, whether or not a seat is free at this moment.

        A request that had to find both free in one moment might never do.
        """
        best = min((priority for priority, _, _ in self._waiting), default=0)
        for held, slot in list(self._slots.items()):
            slot.owed &= self._waiting.keys()
            if not slot.seats and (not slot.owed or slot.priority > best):
                del self._slots[held]
        while len(self._slots) < self.slots and (lacking := self._lacking()):
            priority, tenant, adapter = min(lacking, key=self._claim)
            assert adapter is not None
            self._slots[adapter] = _Slot(tenant, priority, {flow for flow in lacking if flow[2] == adapter})
            self._tenants.setdefault(tenant, _Share()).granted = next(self._numbers)

    def _lacking(self, priority: int | None = None) -> list[Flow]:
        """The flows that wait for an adapter without a slot."""
        return [
            flow
            for flow in self._waiting
            if flow[2] is not None and flow[2] not in self._slots and priority in (None, flow[0])
        ]

    def _claim(self, flow: Flow) -> tuple[int, ...]:
        """The smallest claim gets a slot first: whose tenant has fewest, or had its last one longest ago."""
        priority, tenant, _ = flow
        held = sum(slot.tenant == tenant for slot in self._slots.values())
        first = next(iter(self._waiting[flow]))
        return (priority, held, self._tenants.get(tenant, _NO_SHARE).granted, first)

    def _free_slots(self) -> None:
        """Make as many adapters give their slot up as there are others that want one, half of the slots at most."""
        best = min((priority for priority, _, _ in self._waiting), default=0)
        wanted = {adapter for _, _, adapter in self._lacking(best)}
        leaving = min(len(wanted), max(1, self.slots // 2))
        # In the order of their coming: who has held one longest is first.
        for slot in self._slots.values():
            slot.leaving = leaving > 0 and slot.seats > 0
            leaving -= slot.leaving

    def _forget(self) -> None:
        """Drop the shares of those with no ticket, once they are many: their last turn is the oldest anyway."""
        if len(self._adapters) <= 4 * (len(self._seated) + len(self._waiting)) + 64:
            return
        seated = {(ticket.tenant, _name(ticket.adapter)) for ticket in self._seated.values()}
        present = seated | {(tenant, _name(adapter)) for _, tenant, adapter in self._waiting}
        tenants = {tenant for tenant, _ in present}
        self._adapters = {key: share for key, share in self._adapters.items() if key in present}
        self._tenants = {key: share for key, share in self._tenants.items() if key in tenants}


def _name(adapter: str | None) -> str | None:
    """The adapter that this is a version of."""
    return None if adapter is None else adapter.partition("@")[0]
