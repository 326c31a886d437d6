from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.fair_queue import FairQueue, Ticket


def seated(tickets):
    return [ticket for ticket in tickets if ticket.is_seated]


def test_a_free_engine_seats_whoever_comes_at_once():
    line = FairQueue(8, 2)
    assert line.enter("acme", "tone").is_seated
    assert line.enter("acme").is_seated
    assert (line.busy, line.waiting, line.active) == (2, 0, {"tone"})


def test_a_tenant_s_flood_leaves_a_seat_for_somebody_who_has_none():
    line = FairQueue(8, 8)
    flood = [line.enter("flood", "a") for _ in range(64)]
    assert len(seated(flood)) == 7
    assert line.enter("other", "b").is_seated


def test_a_tenant_without_a_seat_gets_the_next_that_is_free():
    line = FairQueue(4, 4)
    flood = [line.enter("flood", "a") for _ in range(64)]
    first, second = line.enter("other", "b"), line.enter("other", "b")
    assert first.is_seated and not second.is_seated
    third = line.enter("third", "c")
    line.leave(flood[0])
    assert third.is_seated and not second.is_seated
    line.leave(flood[1])
    assert not second.is_seated and not flood[3].is_seated, "the last seat is for somebody who has none"


def test_seats_are_shared_by_weight():
    line = FairQueue(13, 8)
    tickets = [line.enter(tenant, tenant, weight=weight) for _ in range(64) for tenant, weight in (("a", 1), ("b", 3))]
    for _ in range(500):
        line.leave(random.Random(0).choice(seated(tickets)))
        tickets = [ticket for ticket in tickets if ticket.number in line._seated or not ticket.is_seated]
        if line.waiting < 40:
            tickets += [line.enter(t, t, weight=w) for _ in range(20) for t, w in (("a", 1), ("b", 3))]
    shares = [ticket.tenant for ticket in seated(tickets)]
    assert 2 <= shares.count("b") / shares.count("a") <= 4


def test_within_a_tenant_an_adapter_s_flood_leaves_the_others_their_turn():
    line = FairQueue(4, 4)
    flood = [line.enter("acme", "hot") for _ in range(64)]
    rare = line.enter("acme", "rare")
    line.leave(flood[0])
    assert rare.is_seated


def test_a_smaller_priority_goes_first_and_a_larger_one_takes_nobody_s_slot():
    line = FairQueue(8, 1)
    hot = line.enter("acme", "hot")
    shadow = line.enter("acme", "shadow", priority=9)
    again = line.enter("acme", "hot")
    assert again.is_seated, "what waits behind everybody does not keep clients out"
    line.leave(hot)
    assert not shadow.is_seated
    line.leave(again)
    assert shadow.is_seated


def test_a_busy_adapter_gives_its_slot_up_to_one_that_waits():
    line = FairQueue(16, 2)
    hot = [line.enter("acme", adapter) for adapter in ("a", "b") for _ in range(2)]
    cold = line.enter("acme", "cold")
    held_up = line.enter("acme", "a")
    assert not cold.is_seated and not held_up.is_seated
    assert line.enter("acme", "b").is_seated, "half of the slots at most are being given up"
    line.leave(hot[0])
    line.leave(hot[1])
    assert cold.is_seated and line.active == {"b", "cold"}
    assert not held_up.is_seated


def test_who_leaves_before_the_turn_frees_the_place():
    line = FairQueue(1, 1)
    first, second, third = (line.enter(tenant) for tenant in "abc")
    line.leave(second)
    line.leave(first)
    assert third.is_seated and line.waiting == 0


async def test_who_gives_up_waiting_takes_no_seat_along():
    line = FairQueue(1, 1)

    async def ask(tenant, seconds):
        async with line.turn(tenant):
            await asyncio.sleep(seconds)
        return tenant

    tasks = [asyncio.create_task(ask(tenant, 0.01)) for tenant in "abcd"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    assert await asyncio.gather(*tasks, return_exceptions=True) != list("abcd")
    assert (line.busy, line.waiting) == (0, 0)


async def test_who_is_called_and_cancelled_in_one_breath_takes_no_seat_along():
    line = FairQueue(1, 1)
    first, second = line.enter("a"), asyncio.create_task(line.turn("b").__aenter__())
    await asyncio.sleep(0)
    line.leave(first)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (line.busy, line.waiting) == (0, 0)


def test_in_the_engine_s_own_queue_a_newcomer_stands_before_the_rest_of_a_flood_but_not_for_ever():
    line = FairQueue(128, 8)
    flood = [line.enter("flood", "a") for _ in range(20)]
    others = [line.enter("other", "b") for _ in range(2)]
    assert flood[0].order == others[0].order < flood[1].order == others[1].order < flood[19].order
    for ticket in [*others, *flood[:10]]:
        line.leave(ticket)
    assert line.enter("third", "c").order == flood[10].order, "and before those who came earlier not any more"


def test_a_thousand_adapters_leave_no_memory_behind():
    line = FairQueue(16, 8)
    for number in range(5000):
        line.leave(line.enter(f"tenant-{number % 100}", f"adapter-{number}"))
    assert len(line._adapters) <= 200 and not line._slots and not line._seated and not line._waiting


class Crowd:
    """An adversary's traffic: every flow has `deep` requests in line at any moment, each answer takes up to `long`."""

    def __init__(self, line: FairQueue, flows: list[tuple[str, str | None]], deep: int, long: int, seed: int) -> None:
        self.line, self.flows, self.deep, self.long = line, flows, deep, long
        self.dice = random.Random(seed)
        self.inside: dict[int, tuple[Ticket, int]] = {}
        self.outside: list[Ticket] = []

    def step(self) -> None:
        for tenant, adapter in self.dice.sample(self.flows, len(self.flows)):
            mine = sum((t.tenant, t.adapter) == (tenant, adapter) for t in self.outside)
            self.outside += [self.line.enter(tenant, adapter) for _ in range(self.deep - mine)]
        for ticket in seated(self.outside):
            self.inside[ticket.number] = (ticket, self.dice.randint(1, self.long))
        self.outside = [ticket for ticket in self.outside if not ticket.is_seated]
        for number, (ticket, left) in list(self.inside.items()):
            self.inside[number] = (ticket, left - 1)
            if left <= 1:
                del self.inside[number]
                self.line.leave(ticket)
        self.check()

    def check(self) -> None:
        seats = list(self.line._seated.values())
        assert len(seats) <= self.line.seats
        held = {ticket.adapter for ticket in seats} - {None}
        assert held <= self.line.active <= held | {adapter for _, _, adapter in self.line._waiting}
        assert len(self.line.active) <= self.line.slots


flows = st.lists(
    st.tuples(st.sampled_from(["t1", "t2", "t3", "t4"]), st.sampled_from([None, *"abcdefghijkl"])),
    min_size=1,
    max_size=14,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(flows, st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
def test_nobody_waits_for_ever_whatever_the_others_do(flows, seats, slots, deep, long, seed):
    line = FairQueue(seats, slots)
    crowd = Crowd(line, flows, deep, long, seed)
    for _ in range(20):
        crowd.step()
    for tenant, adapter in (crowd.dice.choice(flows), ("new", "z"), ("t1", "z")):
        ticket, steps = line.enter(tenant, adapter), 0
        # Each flow before it may take a turn of a whole answer, its own first `deep`; a slot takes one more to drain.
        bound = 2 * long * (len(flows) + 2) * (deep + 1)
        while not ticket.is_seated:
            crowd.step()
            steps += 1
            assert steps <= bound, f"{tenant}/{adapter} waited for more than {bound} steps"
        line.leave(ticket)


@settings(max_examples=60, deadline=None)
@given(flows, st.integers(2, 12), st.integers(1, 5), st.integers(0, 999))
def test_no_seat_stays_free_while_somebody_could_use_it(flows, seats, slots, seed):
    line = FairQueue(seats, slots)
    crowd = Crowd(line, flows, 2, 3, seed)
    for _ in range(30):
        crowd.step()
        if line.busy < line.seats - line._reserve:
            blocked = {ticket.adapter for ticket in crowd.outside if not ticket.is_seated}
            assert None not in blocked
            assert all(adapter not in line._slots or line._slots[adapter].leaving for adapter in blocked)
            assert not blocked or len(line.active) == line.slots
