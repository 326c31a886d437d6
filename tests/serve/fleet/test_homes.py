from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.fleet.homes import Replica, Replicas, bounds, homes_for, order, ranked

NAMES = [f"tenant/adapter-{number}" for number in range(10_000)]
ids = st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=40, unique=True)


def fleet(count, **fields):
    return [Replica(f"replica-{number}", **fields) for number in range(count)]


def ordered(replicas, name, rank=0):
    return [replicas.members[place].id for place in order(replicas, name, rank)]


@given(ids, st.text(max_size=30), st.randoms())
@settings(deadline=None)
def test_the_order_depends_on_who_lives_and_not_on_who_was_named_first(ids, name, random):
    members = [Replica(id) for id in ids]
    shuffled = random.sample(members, len(members))
    first = ordered(Replicas.of(members), name)
    assert first == ordered(Replicas.of(shuffled), name)
    assert sorted(first) == sorted(ids)


@given(ids, st.text(max_size=30), st.data())
@settings(deadline=None)
def test_who_leaves_changes_nothing_in_the_order_of_the_others(ids, name, data):
    gone = data.draw(st.sampled_from(ids))
    everybody = ordered(Replicas.of(map(Replica, ids)), name)
    others = ordered(Replicas.of(Replica(id) for id in ids if id != gone), name)
    assert others == [id for id in everybody if id != gone]


def test_an_order_is_the_same_on_every_machine_and_in_every_release():
    assert ordered(Replicas.of(fleet(5)), "acme/tone") == PINNED
    assert ordered(Replicas.of(fleet(5)), "tone", rank=8) == ordered(Replicas.of(fleet(5)), "tone")


def test_one_replica_that_leaves_moves_about_its_part_of_ten_thousand_names():
    before = Replicas.of(fleet(20))
    homes = {name: ordered(before, name)[0] for name in NAMES}
    for gone in (0, 7, 19):
        after = Replicas.of(member for member in fleet(20) if member.id != f"replica-{gone}")
        moved = sum(ordered(after, name)[0] != home for name, home in homes.items())
        assert moved <= 1.2 * len(NAMES) / 20
        assert moved == Counter(homes.values())[f"replica-{gone}"]


def test_a_replica_with_twice_the_slots_is_home_to_twice_the_names():
    replicas = Replicas.of([*fleet(4, slots=8), Replica("large", slots=16)])
    homes = Counter(ordered(replicas, name)[0] for name in NAMES)
    assert 0.9 < homes["large"] / (2 * len(NAMES) / 6) < 1.1
    assert all(0.85 < homes[member.id] / (len(NAMES) / 6) < 1.15 for member in fleet(4))


def test_a_replica_is_no_home_for_a_rank_that_it_cannot_hold():
    replicas = Replicas.of([*fleet(3, max_rank=16), Replica("wide", max_rank=64), Replica("full", slots=0)])
    for name in NAMES[:100]:
        assert ordered(replicas, name, rank=32) == ["wide"]
        assert set(ordered(replicas, name, rank=16)) == {"wide", "replica-0", "replica-1", "replica-2"}
        # Nobody can: somebody must say so.
        assert len(ordered(replicas, name, rank=128)) == 5


@given(st.floats(0, 1), st.integers(1, 500), st.floats(0, 1e6), st.floats(0, 1e3))
def test_a_name_has_at_least_one_home_and_at_most_all(share, replicas, load, seats):
    assert 1 <= homes_for(share, replicas, load, seats) <= replicas
    assert homes_for(share, replicas, load, seats) <= homes_for(min(1.0, 2 * share), replicas, load, seats)


def test_homes_follow_the_share_unless_hardly_anything_is_asked():
    assert homes_for(0.1, 20, load=1000, seats=16) == 4
    assert homes_for(0.01, 20, load=1000, seats=16) == 1
    # All of two requests are for one name: a second home would only load it too.
    assert homes_for(1.0, 20, load=2, seats=16) == 1


@given(st.lists(st.floats(0, 100), min_size=3, max_size=30), st.data())
def test_first_come_homes_with_room_then_holders_with_room_then_everybody(loads, data):
    places = st.sets(st.integers(0, len(loads) - 1), max_size=5)
    homes, holders = data.draw(places), data.draw(places)
    most = bounds(sum(loads), len(loads), seats=2)
    ranks = ranked(sorted(homes), holders, loads, most, range(len(loads)))
    assert list(ranks[-1]) == list(range(len(loads)))
    free = {home for home in homes if loads[home] < most.crowded}
    holding = {holder for holder in homes | holders if loads[holder] < most.full}
    assert [set(rank) for rank in ranks[:-1]] == [group for group in (free, holding) if group]


def test_a_replica_is_crowded_above_the_mean_and_not_while_three_quarters_of_its_seats_are_free():
    assert (bounds(160, 10, seats=16).crowded, bounds(160, 10, seats=16).full) == (18, 24)
    assert (bounds(1, 10, seats=16).crowded, bounds(1, 10, seats=16).full) == (4, 8)


PINNED = ["replica-3", "replica-2", "replica-4", "replica-1", "replica-0"]
