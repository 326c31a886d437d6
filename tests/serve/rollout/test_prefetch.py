from __future__ import annotations

import pytest

from serve.rollout.prefetch import HALF_LIFE, REMEMBERED, Popularity


class Clock:
    now = 1.8e9

    def __call__(self):
        return self.now


def test_a_use_counts_half_after_a_while():
    clock = Clock()
    popularity = Popularity(clock)
    for _ in range(4):
        popularity.used("old")
    assert popularity.uses("old") == pytest.approx(4)
    clock.now += 2 * HALF_LIFE
    popularity.used("new")
    popularity.used("newer", 3)
    assert popularity.uses("old") == pytest.approx(1) and popularity.uses("never") < 1e-9
    assert popularity.ranked(["never", "old", "newer", "new"])[0] == "newer"


def test_it_remembers_few_over_a_restart_and_takes_rubbish_for_nothing(tmp_path):
    popularity = Popularity(Clock())
    for number in range(3 * REMEMBERED):
        popularity.used(f"a{number}", 1 + number)
    file = tmp_path / "popular.json"
    popularity.save(file)
    again = Popularity(Clock())
    again.load(file)
    assert again.uses(f"a{3 * REMEMBERED - 1}") == pytest.approx(3 * REMEMBERED)
    assert len(again._scores) == REMEMBERED
    for rubbish in ("", "[1]", '{"a": "x"}', '{"a": null}'):
        file.write_text(rubbish)
        Popularity(Clock()).load(file)
    Popularity(Clock()).load(tmp_path / "nowhere")
    popularity.save(tmp_path / "no-such-folder/popular.json")
