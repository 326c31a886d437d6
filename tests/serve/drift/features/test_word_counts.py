"""Words are shown once five different askers used them, and not before, nowhere."""

from __future__ import annotations

import json
import random

from serve.drift.features.word_counts import ASKERS, MOST, WordCounts, hashed
from serve.models.language import STOP_WORDS


def counted(texts, half_life=0.0, first=0):
    counts = WordCounts(half_life)
    for asker, text in enumerate(texts, first):
        counts.add(hashed(text.split(), STOP_WORDS), asker)
    return counts


def test_a_word_is_known_by_name_once_five_askers_used_it():
    counts = counted(["secretproject payment"] * (ASKERS - 1))
    assert "secretproject" not in repr(counts._counts) and counts.typical([]) == []
    assert "secretproject" not in json.dumps(counts.state())
    counts.add(hashed(["secretproject"], STOP_WORDS), ASKERS - 2)
    assert "secretproject" not in repr(counts._counts), "one of them asked again"
    counts.add(hashed(["secretproject"], STOP_WORDS), 99)
    assert "secretproject" in json.dumps(counts.state()) and "payment" not in json.dumps(counts.state())


def test_the_typical_words_are_those_that_the_others_do_not_use():
    before = counted(["please invoice payment today"] * 60)
    now = counted(["please rezept backofen today"] * 30, first=100)
    assert set(now.typical([before])) == {"rezept", "backofen"}
    assert set(before.typical([now])) == {"invoice", "payment"}
    assert now.typical([now]) == []


def test_old_requests_count_for_less():
    counts = counted(["invoice"] * 100, half_life=10)
    for asker in range(50):
        counts.add(hashed(["rezept"], STOP_WORDS), asker)
    assert counts.count_at_most(hash("rezept")) > 9 > 1 > counts.count_at_most(hash("invoice"))
    assert 9 < counts.requests <= 20
    kept = counts.unfading()
    kept.add({}, 1)
    assert kept.requests == counts.requests + 1


def test_what_is_kept_is_bounded_and_survives_a_restart():
    draw, counts = random.Random(0), WordCounts(64)
    for asker in range(3000):
        words = [f"word{draw.randrange(20)}"] * 3 + [f"rare{draw.randrange(10**9)}" for _ in range(10)]
        counts.add(hashed(words, STOP_WORDS), asker)
    assert len(counts._counts) <= 2 * MOST
    again = WordCounts.from_state(json.loads(json.dumps(counts.state())))
    assert again.requests == counts.requests and "rare" not in json.dumps(counts.state())
    assert abs(again.count_at_most(hash("word7")) - counts.count_at_most(hash("word7"))) < 0.01


def test_the_rarest_words_make_room_and_of_equal_ones_the_latest():
    counts = WordCounts()
    for number in range(2 * MOST):
        counts.add({number: f"word{number}"}, 0)
        if number % 4 == 0:
            counts.add({number: f"word{number}"}, 0)
    counts.add({2 * MOST: "one more"}, 0)
    twice, once = [n for n in range(2 * MOST) if n % 4 == 0], [n for n in range(2 * MOST) if n % 4]
    assert list(counts._counts) == twice + once[: MOST - len(twice)]
    assert counts.count_at_most(once[-1]) == 1


def test_common_and_short_words_are_not_counted():
    assert set(hashed(["the", "und", "ab", "über", "brot", "東京"], STOP_WORDS).values()) == {"brot", "東京"}
    assert len(hashed([f"word{i}" for i in range(500)], STOP_WORDS, most=80)) == 80
