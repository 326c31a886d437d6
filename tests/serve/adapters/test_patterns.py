"""A pattern from outside is refused before it costs, and matched within its time."""

from __future__ import annotations

import time

import pytest

from serve.adapters.patterns import occurs, pattern_problem


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"^\d+$", ""),
        ("(a{999}){999}", "too many counted repeats"),
        ("a{100000}", "too many counted repeats"),
        ("(unclosed", "no regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_named(pattern, problem):
    assert pattern_problem(pattern).find(problem) >= 0 and bool(pattern_problem(pattern)) == bool(problem)


def test_a_pattern_that_backtracks_for_ever_ends_in_time():
    began = time.thread_time()
    with pytest.raises(TimeoutError):
        occurs(r"(a|aa)+$", "a" * 60 + "b", 0.1)
    assert time.thread_time() - began < 5


def test_a_pattern_may_match_anywhere():
    assert occurs("Paris", "It is Paris.", 1.0) and not occurs("^Paris", "It is Paris.", 1.0)
