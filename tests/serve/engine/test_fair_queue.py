from __future__ import annotations

import asyncio
import random
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.fair_queue import FairQueue, Ticket


def seated(tickets):
    return [ticket for ticket in tickets if ticket.is_seated]


def test_a_free_engine_seats_whoever_comes_at_once():
    queue = FairQueue(8, 2)
    assert queue.enter("acme", "tone").is_seated
    assert queue.enter("acme").is_seated
    assert (queue.busy, queue.waiting, queue.active) == (2, 0, {"tone"})


def test_a_tenant_s_flood_leaves_a_seat_for_somebody_who_has_none():
    queue = FairQueue(8, 8)
    flood = [queue.enter("flood", "a") for _ in range(64)]
    assert len(seated(flood)) == 7
    assert queue.enter("other", "b").is_seated


def test_a_tenant_without_a_seat_gets_the_next_that_is_free():
    queue = FairQueue(4, 4)
    flood = [queue.enter("flood", "a") for _ in range(64)]
    first, second = queue.enter("other", "b"), queue.enter("other", "b")
    assert first.is_seated and not second.is_seated
    third = queue.enter("third", "c")
    queue.leave(flood[0])
    assert third.is_seated and not second.is_seated
    queue.leave(flood[1])
    assert not second.is_seated and not flood[3].is_seated, "the last seat is for somebody who has none"


def test_the_versions_of_an_adapter_are_seated_in_the_order_of_their_coming():
    queue = FairQueue(4, 4)
    busy = [queue.enter("acme", "tone@live") for _ in range(3)]
    waiting = [queue.enter("acme", f"tone@{version}") for version in ("live", "live", "canary", "live", "canary")]
    order = []
    for ticket in busy + waiting[:2]:
        queue.leave(ticket)
        order += [number for number, other in enumerate(waiting) if other.is_seated and number not in order]
    assert order == [0, 1, 2, 3, 4]


def test_an_adapter_with_a_canary_has_no_more_seats_than_one_without():
    queue = FairQueue(13, 4)
    tickets = [
        queue.enter("acme", adapter) for _ in range(20) for adapter in ("tone@live", "tone@canary", "other@live")
    ]
    for ticket in tickets[:8]:
        queue.leave(ticket)
    seats = [ticket.adapter for ticket in tickets[8:] if ticket.is_seated]
    assert seats.count("other@live") == len(seats) / 2


def test_a_request_takes_a_seat_for_each_of_its_sequences():
    queue = FairQueue(16, 4)
    many = queue.enter("flood", "a", size=10)
    assert many.is_seated and queue.busy == 10
    again = queue.enter("flood", "a", size=10)
    assert not again.is_seated
    assert queue.enter("other", "b").is_seated, "the reserve is for who has none"
    queue.leave(many)
    assert again.is_seated and queue.busy == 11


def test_a_request_of_more_sequences_than_seats_leaves_the_reserve():
    queue = FairQueue(16, 4)
    assert queue.enter("flood", "a", size=400).is_seated
    assert (queue.busy, queue.enter("other", "b").is_seated) == (14, True)


def test_a_request_of_many_sequences_gets_its_seats_while_small_ones_keep_coming():
    queue = FairQueue(16, 16)
    small = [queue.enter(f"tenant {number}") for number in range(16)]
    large = queue.enter("large", size=14)
    for number in range(200):
        if large.is_seated:
            break
        queue.leave(small.pop(0))
        small.append(queue.enter(f"newcomer {number}"))
        small = [*seated(small), *(ticket for ticket in small if not ticket.is_seated)]
    assert large.is_seated and number < 40
    assert queue.busy <= 16


def test_who_has_no_seat_passes_a_large_request_that_waits_for_its_seats():
    queue = FairQueue(16, 16)
    first = [queue.enter("first") for _ in range(14)]
    large = queue.enter("large", size=14)
    assert not large.is_seated and queue.enter("victim").is_seated
    assert not queue.enter("victim").is_seated, "it has one"
    for ticket in first:
        queue.leave(ticket)
    assert large.is_seated


def test_the_sequences_of_a_large_request_go_behind_another_tenants_in_the_engine_too():
    queue = FairQueue(16, 4)
    large = queue.enter("flood", "a", size=14)
    other = queue.enter("other", "b")
    assert other.is_seated and other.order < large.order


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40), st.integers(0, 1)), max_size=60), st.randoms())
def test_seats_add_up_and_everybody_is_seated_in_the_end(arrivals, lots):
    queue = FairQueue(12, 4)
    tickets = []
    for tenant, size, priority in arrivals:
        tickets.append(queue.enter(tenant, size=size, priority=priority))
        assert queue.busy == sum(ticket.size for ticket in seated(tickets)) <= 12
        if lots.random() < 0.5 and seated(tickets):
            leaving = lots.choice(seated(tickets))
            tickets.remove(leaving)
            queue.leave(leaving)
    while tickets:
        assert seated(tickets), "somebody waits and nobody has a seat"
        leaving = lots.choice(seated(tickets))
        tickets.remove(leaving)
        queue.leave(leaving)
    assert (queue.busy, queue.waiting, queue.ahead("a", 9)) == (0, 0, 0)


def test_seats_are_shared_by_weight():
    queue = FairQueue(13, 8)
    tickets = [queue.enter(tenant, tenant, weight=weight) for _ in range(64) for tenant, weight in (("a", 1), ("b", 3))]
    for _ in range(500):
        queue.leave(random.Random(0).choice(seated(tickets)))
        tickets = [ticket for ticket in tickets if ticket.number in queue._seated or not ticket.is_seated]
        if queue.waiting < 40:
            tickets += [queue.enter(t, t, weight=w) for _ in range(20) for t, w in (("a", 1), ("b", 3))]
    shares = [ticket.tenant for ticket in seated(tickets)]
    assert 2 <= shares.count("b") / shares.count("a") <= 4


def test_within_a_tenant_an_adapter_s_flood_leaves_the_others_their_turn():
    queue = FairQueue(4, 4)
    flood = [queue.enter("acme", "hot") for _ in range(64)]
    rare = queue.enter("acme", "rare")
    queue.leave(flood[0])
    assert rare.is_seated


def test_a_smaller_priority_goes_first_and_a_larger_one_takes_nobody_s_slot():
    queue = FairQueue(8, 1)
    hot = queue.enter("acme", "hot")
    shadow = queue.enter("acme", "shadow", priority=9)
    again = queue.enter("acme", "hot")
    assert again.is_seated, "what waits behind everybody does not keep clients out"
    queue.leave(hot)
    assert not shadow.is_seated
    queue.leave(again)
    assert shadow.is_seated


def test_a_busy_adapter_gives_its_slot_up_to_one_that_waits():
    queue = FairQueue(16, 2)
    hot = [queue.enter("acme", adapter) for adapter in ("a", "b") for _ in range(2)]
    cold = queue.enter("acme", "cold")
    held_up = queue.enter("acme", "a")
    assert not cold.is_seated and not held_up.is_seated
    assert queue.enter("acme", "b").is_seated, "half of the slots at most are being given up"
    queue.leave(hot[0])
    queue.leave(hot[1])
    assert cold.is_seated and queue.active == {"b", "cold"}
    assert not held_up.is_seated


def test_who_leaves_before_the_turn_frees_the_place():
    queue = FairQueue(1, 1)
    first, second, third = (queue.enter(tenant) for tenant in "abc")
    queue.leave(second)
    queue.leave(first)
    assert third.is_seated and queue.waiting == 0


async def test_who_gives_up_waiting_takes_no_seat_along():
    queue = FairQueue(1, 1)

    async def ask(tenant, seconds):
        async with queue.turn(tenant):
            await asyncio.sleep(seconds)
        return tenant

    tasks = [asyncio.create_task(ask(tenant, 0.01)) for tenant in "abcd"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    assert await asyncio.gather(*tasks, return_exceptions=True) != list("abcd")
    assert (queue.busy, queue.waiting) == (0, 0)


async def test_who_is_called_and_cancelled_in_one_breath_takes_no_seat_along():
    queue = FairQueue(1, 1)
    first, second = queue.enter("a"), asyncio.create_task(queue.turn("b").__aenter__())
    await asyncio.sleep(0)
    queue.leave(first)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (queue.busy, queue.waiting) == (0, 0)


def test_in_the_engine_s_own_queue_a_newcomer_stands_before_the_rest_of_a_flood_but_not_for_ever():
    queue = FairQueue(128, 8)
    flood = [queue.enter("flood", "a") for _ in range(20)]
    others = [queue.enter("other", "b") for _ in range(2)]
    assert flood[0].order == others[0].order < flood[1].order == others[1].order < flood[19].order
    for ticket in [*others, *flood[:10]]:
        queue.leave(ticket)
    assert queue.enter("third", "c").order == flood[10].order, "and before those who came earlier not any more"


def test_a_thousand_adapters_leave_no_memory_behind():
    queue = FairQueue(16, 8)
    for number in range(5000):
        queue.leave(queue.enter(f"tenant-{number % 100}", f"adapter-{number}"))
    assert len(queue._adapters) <= 200 and not queue._slots and not queue._seated and not queue._waiting


class Crowd:
    """An adversary's traffic: every flow has `deep` requests in queue at any moment, each answer takes up to `long`."""

    def __init__(self, queue: FairQueue, flows: list[tuple[str, str | None]], deep: int, long: int, seed: int) -> None:
        self.queue, self.flows, self.deep, self.long = queue, flows, deep, long
        self.dice = random.Random(seed)
        self.inside: dict[int, tuple[Ticket, int]] = {}
        self.outside: list[Ticket] = []

    def step(self) -> None:
        for tenant, adapter in self.dice.sample(self.flows, len(self.flows)):
            mine = sum((t.tenant, t.adapter) == (tenant, adapter) for t in self.outside)
            self.outside += [self.queue.enter(tenant, adapter) for _ in range(self.deep - mine)]
        for ticket in seated(self.outside):
            self.inside[ticket.number] = (ticket, self.dice.randint(1, self.long))
        self.outside = [ticket for ticket in self.outside if not ticket.is_seated]
        for number, (ticket, left) in list(self.inside.items()):
            self.inside[number] = (ticket, left - 1)
            if left <= 1:
                del self.inside[number]
                self.queue.leave(ticket)
        self.check()

    def check(self) -> None:
        seats = list(self.queue._seated.values())
        assert len(seats) <= self.queue.seats
        held = {ticket.adapter for ticket in seats} - {None}
        assert held <= self.queue.active <= held | {adapter for _, _, adapter in self.queue._waiting}
        assert len(self.queue.active) <= self.queue.slots


flows = st.lists(
    st.tuples(st.sampled_from(["t1", "t2", "t3", "t4"]), st.sampled_from([None, *"abcdefghijkl"])),
    min_size=1,
    max_size=14,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(flows, st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
def test_nobody_waits_for_ever_whatever_the_others_do(flows, seats, slots, deep, long, seed):
    queue = FairQueue(seats, slots)
    crowd = Crowd(queue, flows, deep, long, seed)
    for _ in range(20):
        crowd.step()
    for tenant, adapter in (crowd.dice.choice(flows), ("new", "z"), ("t1", "z")):
        ticket, steps = queue.enter(tenant, adapter), 0
        # Each flow before it may take a turn of a whole answer, its own first `deep`; a slot takes one more to drain.
        bound = 2 * long * (len(flows) + 2) * (deep + 1)
        while not ticket.is_seated:
            crowd.step()
            steps += 1
            assert steps <= bound, f"{tenant}/{adapter} waited for more than {bound} steps"
        queue.leave(ticket)


@settings(max_examples=60, deadline=None)
@given(flows, st.integers(2, 12), st.integers(1, 5), st.integers(0, 999))
def test_no_seat_stays_free_while_somebody_could_use_it(flows, seats, slots, seed):
    queue = FairQueue(seats, slots)
    crowd = Crowd(queue, flows, 2, 3, seed)
    for _ in range(30):
        crowd.step()
        if queue.busy < queue.seats - queue._reserve:
            blocked = {ticket.adapter for ticket in crowd.outside if not ticket.is_seated}
            assert None not in blocked
            assert all(adapter not in queue._slots or queue._slots[adapter].leaving for adapter in blocked)
            assert not blocked or len(queue.active) == queue.slots


def test_how_many_wait_is_read_by_another_thread_while_they_come_and_go():
    queue, errors, done = FairQueue(1, 1), [], threading.Event()
    for number in range(500):
        queue.enter(f"tenant-{number}")

    def scrape():
        while not done.is_set():
            try:
                assert queue.waiting >= 499
            except RuntimeError as error:
                errors.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for number in range(300):
            queue.leave(queue.enter(f"guest-{number}"))
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors


def test_the_backlog_says_how_many_wait_and_when_the_first_came_by_tenant_and_adapter():
    queue = FairQueue(1, 4)
    queue.enter("acme")
    first, second = queue.enter("acme", "tone"), queue.enter("acme", "tone", priority=3)
    queue.enter("acme", "tone", priority=100)
    queue.enter("zeta", "calm")
    backlog = queue.backlog(below=100)
    assert {owner: of.tickets for owner, of in backlog.items()} == {("acme", "tone"): 2, ("zeta", "calm"): 1}
    assert backlog["acme", "tone"].oldest == min(first.entered, second.entered)
    queue.leave(first)
    assert queue.backlog(below=100)["acme", "tone"].oldest == second.entered
