"""The time left is of what a step does now: loading is no part of its pace."""

from __future__ import annotations

from optimize.cli import Pace


def test_what_loading_took_is_no_part_of_the_time_left():
    pace = Pace()
    assert pace.left(280, 1, 52) is None  # the first word comes after the model was loaded
    assert pace.left(283, 3, 52) == 1.5 * 49


def test_each_total_is_a_count_of_other_things():
    """The engine loads two models, then runs 50 rounds."""
    pace = Pace()
    assert pace.left(0, 0, 2) is None
    assert pace.left(280, 1, 2) == 280
    assert pace.left(560, 1, 50) is None
    assert pace.left(561, 2, 50) == 48
    assert pace.left(600, 50, 50) is None


def test_a_count_that_begins_anew_has_a_pace_of_its_own():
    """Smoothing and rounding each go over all layers."""
    pace = Pace()
    pace.left(0, 0, 30)
    assert pace.left(290, 29, 30) == 10
    assert pace.left(300, 0, 30) is None
    assert pace.left(301, 1, 30) == 29
