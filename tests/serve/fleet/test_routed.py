"""A router in front of servers names the same homes as they do themselves."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest

from serve.fleet.homes import mark
from serve.fleet.membership import Membership, Report
from serve.fleet.routed import RoutedServers, Stats

SLOTS, SEATS = 64, 8.0
NAMES = [f"adapter-{number}" for number in range(200)]


def stats(id, held=(), **fields):
    told = Stats(id, ["base"], SLOTS, 16, SEATS, [mark(name) for name in held])
    return {**msgspec.structs.asdict(told), **fields}


@pytest.fixture
def servers():
    servers = RoutedServers()
    servers.see({f"key-{number}": stats(f"server-{number}") for number in range(4)})
    return servers


IDLE = {f"key-{number}": 0.0 for number in range(4)}


def test_a_name_has_one_home_whoever_has_least_to_do(servers):
    first = {name: servers.ranks(name, IDLE, 0.0)[0] for name in NAMES}
    busier = {**IDLE, "key-0": 1.0}
    assert {name: servers.ranks(name, busier, 1.0)[0] for name in NAMES} == first
    homes = Counter(home for (home,) in first.values())
    assert len(homes) == 4 and max(homes.values()) < 2 * len(NAMES) / 4


def test_a_router_and_the_servers_themselves_name_the_same_home(servers):
    """So nothing is sent on a second time."""
    here = SimpleNamespace(load=0.0, seats=SEATS, report=lambda: Report(SLOTS, 16, 0.0))
    members = [Membership(f"server-{number}", f"http://{number}", ["base"], here) for number in range(4)]
    rows = [{"id": member.me, **member.told()} for member in members]
    for member in members:
        member.hear([row for row in rows if row["id"] != member.me])
    for name in NAMES:
        ((home,), *_) = servers.ranks(name, IDLE, 0.0)
        at_home = [member.me for member in members if member.is_home(name, 0)]
        assert at_home == [home.replace("key", "server")]
        assert members[int(home[-1])].route(name, 0) is None


def test_what_a_server_tells_a_router_is_what_it_tells_the_others():
    here = SimpleNamespace(load=3.0, seats=SEATS, report=lambda: Report(SLOTS, 16, 3.0, ("b", "a")))
    member = Membership("server-0", "http://0", ["base"], here)
    assert member.routing_stats() == {}, "it answers nobody yet"
    member.told()
    assert member.routing_stats() == stats("server-0", held=sorted(("a", "b"), key=mark))
    here.report = lambda: Report(SLOTS, 16, 9.0, ("a", "b"))
    before = member.routing_stats()
    member.told()
    assert member.routing_stats() == before, "load and order would be told to every router each second"


def test_a_crowded_home_is_passed_over_for_who_holds_the_adapter_then_for_all(servers):
    name = NAMES[0]
    ((home,), *_) = servers.ranks(name, IDLE, 0.0)
    holder = next(key for key in IDLE if key != home)
    told = {key: stats(key.replace("key", "server"), [name] if key == holder else ()) for key in IDLE}
    servers.see(told)
    assert set(servers.ranks(name, {**IDLE, home: 3.0}, 0.0)[0]) == {holder, home}
    ranks = servers.ranks(name, {**IDLE, home: 90.0, holder: 90.0}, 0.0)
    assert set(ranks[-1]) == set(IDLE)


def test_what_has_no_home_goes_to_whoever_has_least_to_do(servers):
    for name in ("", "base"):
        servers.count(name)
        assert servers.ranks(name, IDLE, 0.0) == [list(IDLE)]


def test_a_server_that_has_told_nothing_yet_is_no_home_and_can_be_asked(servers):
    told = {f"key-{number}": stats(f"server-{number}") for number in range(4)}
    servers.see({**told, "key-new": {}, "key-odd": {"slots": "many"}})
    loads = {**IDLE, "key-new": 0.0, "key-odd": 0.0}
    for name in NAMES:
        ranks = servers.ranks(name, loads, 0.0)
        assert ranks[0][0] in IDLE and set(ranks[-1]) == set(loads)
    servers.see({"key-new": {}})
    assert servers.ranks(NAMES[0], {"key-new": 0.0}, 0.0) == [["key-new"]]


def test_a_server_that_the_router_has_just_lost_costs_no_request(servers):
    alive = {key: 0.0 for key in IDLE if key != "key-0"}
    assert all(servers.ranks(name, alive, 0.0)[-1] == list(alive) for name in NAMES)


def test_a_hot_name_gets_more_homes(servers):
    hot = NAMES[0]
    loads = dict.fromkeys(IDLE, 20.0)
    for second in range(30):
        for _ in range(50):
            servers.count(hot)
        ranks = servers.ranks(hot, loads, float(second))
    assert len(ranks[0]) > 1
