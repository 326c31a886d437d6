from __future__ import annotations

import pytest

from serve.telemetry.places import Places


@pytest.fixture
def left() -> list[str]:
    return []


@pytest.fixture
def places(left) -> Places[str]:
    return Places(2, left.append)


def test_who_comes_when_all_places_are_taken_gets_none(places, left):
    assert places.take("a") and places.take("b") and places.take("a")
    assert not places.take("c") and not places.expect("c")
    assert places.is_full and not places.has_room and not left


def test_who_is_only_expected_gives_way_to_who_comes_the_first_first(places, left):
    assert places.expect("a") and places.expect("b")
    assert places.has_room and places.take("c")
    assert left == ["a"] and "c" in places and "b" in places


def test_who_was_expected_and_came_stays(places, left):
    places.expect("a")
    places.take("a")
    places.expect("b")
    assert places.take("c") and left == ["b"]


def test_a_place_that_was_released_is_kept_until_somebody_needs_it(places, left):
    places.take("a")
    places.take("b")
    places.release("b")
    assert "b" in places and not left
    places.take("c")
    assert left == ["b"]


def test_who_is_dropped_leaves_once(places, left):
    places.take("a")
    places.drop("a")
    places.drop("a")
    assert left == ["a"] and places.take("b") and places.take("c")
