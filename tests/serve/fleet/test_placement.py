from __future__ import annotations

import random

from serve.fleet.demand import GROW_SECONDS, SHRINK_SECONDS, STEP_SECONDS, Demand, Rates
from serve.fleet.homes import Replica, order
from serve.fleet.placement import FIRST, Placement


def fleet(count):
    return [Replica(f"replica-{number}", slots=8) for number in range(count)]


def placed(count=20, seats=16.0):
    placement = Placement(0.0, seats)
    assert placement.see(fleet(count))
    return placement


class Clock:
    now = 0.0


def ask(demand, clock, seconds, names, replicas=20, load=400.0):
    """A hundred requests a second, dealt evenly over `names`, and a step each second."""
    for _ in range(int(seconds)):
        clock.now += 1
        for number in range(100):
            demand.count(names[number % len(names)])
        demand.step(clock.now, replicas, load, 16.0)


EVEN = [f"name-{number}" for number in range(100)]


def test_a_name_with_a_tenth_of_the_load_gets_homes_and_keeps_one_after_it():
    demand, clock = Demand(0.0), Clock()
    ask(demand, clock, 60, ["hot"] * 10 + EVEN[:90])
    assert demand.homes("hot") == 4
    assert {demand.homes(name) for name in EVEN[:90]} == {1}
    ask(demand, clock, SHRINK_SECONDS * 4, EVEN)
    assert demand.homes("hot") == 1


def test_a_wave_that_comes_and_goes_moves_no_homes():
    demand, clock = Demand(0.0), Clock()
    ask(demand, clock, 90, ["hot"] * 9 + EVEN[:91])
    homes = {demand.homes("hot")}
    for turn in range(20):
        ask(demand, clock, 15, ["hot"] * (8 if turn % 2 else 10) + EVEN[: 92 if turn % 2 else 90])
        homes.add(demand.homes("hot"))
    assert homes == {4}


def test_homes_that_are_crowded_by_a_name_get_company_before_the_next_step():
    demand, clock = Demand(0.0), Clock()
    ask(demand, clock, 60, EVEN)
    for _ in range(50):
        demand.count("crowd")
    assert demand.homes("crowd") == 1
    assert demand.crowded("crowd", clock.now, 20, 400.0, 16.0)
    assert demand.homes("crowd") > 1


def test_a_home_that_others_crowd_gives_a_quiet_name_no_second_home():
    demand, clock = Demand(0.0), Clock()
    ask(demand, clock, 60, EVEN)
    ask(demand, clock, 1, EVEN)
    assert not demand.crowded("name-1", clock.now, 20, 400.0, 16.0)


def test_growth_waits_for_its_turn_where_nobody_is_crowded():
    demand, clock = Demand(0.0), Clock()
    ask(demand, clock, 60, ["hot"] * 6 + EVEN[:94])
    first = demand.homes("hot")
    ask(demand, clock, GROW_SECONDS - STEP_SECONDS, ["hot"] * 6 + EVEN[:94])
    assert demand.homes("hot") == first > 1


def test_servers_that_hear_each_other_name_the_same_homes():
    clock = Clock()
    one, other = Demand(0.0), Demand(0.0)
    for _ in range(90):
        clock.now += 1
        for number in range(100):  # all of the hot name's requests come to one of them
            one.count("hot" if number < 20 else EVEN[number])
            other.count(EVEN[number])
        one.hear({"other": other.own})
        other.hear({"one": one.own})
        one.step(clock.now, 20, 400.0, 16.0)
        other.step(clock.now, 20, 400.0, 16.0)
    assert one.homes("hot") == other.homes("hot") == 4


def test_of_a_hundred_thousand_names_few_are_told_and_remembered():
    demand, clock, rng = Demand(0.0), Clock(), random.Random(0)
    for _ in range(30):
        clock.now += 1
        for _ in range(2000):
            demand.count(f"name-{rng.randrange(100_000)}")
        demand.step(clock.now, 20, 400.0, 16.0)
    assert len(demand.own.names) <= 50 * 20
    assert isinstance(demand.own, Rates)


def test_a_request_goes_to_a_home_then_to_who_holds_it_then_to_anybody():
    placement, loads = placed(), [4.0] * 20
    home = placement.homes("tone")[0]
    holder = (home + 1) % 20
    assert placement.ranks("tone", loads, 1.0, holders={holder})[0] == [home]
    loads[home] = 7.0  # crowded, and not full
    assert set(placement.ranks("tone", loads, 1.0, holders={holder})[0]) == {home, holder}
    loads[home] = 50.0
    assert placement.ranks("tone", loads, 1.0, holders={home, holder})[0] == [holder]
    assert list(placement.ranks("tone", loads, 1.0)[0]) == list(range(20))


def test_a_flash_crowd_spreads_over_homes_that_keep_their_order():
    placement, loads = placed(seats=2.0), [4.0] * 20
    first = list(placement.homes("tone"))
    for _ in range(100):
        placement.count("tone")
    loads[first[0]] = 50.0
    ranks = placement.ranks("tone", loads, 1.0)
    homes = list(placement.homes("tone"))
    assert len(homes) > FIRST and homes[0] == first[0]
    assert ranks[0] == homes[1:]


def test_another_fleet_is_seen_once():
    placement = placed()
    assert not placement.see(fleet(20))
    assert placement.see(fleet(19))
    assert len(placement.members) == 19


def test_a_name_is_hashed_once_while_the_fleet_stays_the_same(monkeypatch):
    hashed = []
    monkeypatch.setattr("serve.fleet.placement.order", lambda *what: hashed.append(what) or order(*what))
    placement, loads = placed(200), [4.0] * 200
    for _ in range(100):
        placement.ranks("tone", loads, 1.0)
    assert len(hashed) == 1
    placement.see(fleet(199))
    placement.ranks("tone", loads[1:], 1.0)
    assert len(hashed) == 2
