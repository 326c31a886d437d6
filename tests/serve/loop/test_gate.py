"""What the gate lets pass, and how often it is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.loop.chain import promotes, spend
from serve.loop.gate import GOLDEN, NEW, REFERENCE, Gate, compared
from serve.sequential.sequential_test import Verdict


def pairs(count, live, candidate):
    return [(live, candidate)] * count


def test_a_candidate_that_is_better_passes_and_one_that_is_as_good_does_not():
    better, same = (
        compared(NEW, "", pairs(60, 0.4, 0.7), 0.05, 0.0125),
        compared(NEW, "", pairs(500, 0.4, 0.4), 0.05, 0.0125),
    )
    assert better.passed and not same.passed
    assert same.log_evidence == 0.0 and "not proved to be better on the new traffic" in same.sentence


def test_no_worse_by_the_tolerance_needs_enough_examples():
    few, enough = (compared(REFERENCE, "v1", pairs(count, 0.6, 0.6), 0.05, 0.0125) for count in (120, 130))
    assert few.needed == 130 and not few.passed and enough.passed
    assert few.sentence == (
        "it is not proved to be no worse by 0.05 on the reference v1: 0.600 against 0.600 on 120 examples; "
        "130 examples are needed at least"
    )


def test_what_is_lost_by_more_than_the_tolerance_is_forgotten():
    part = compared(REFERENCE, "v3", pairs(300, 0.9, 0.7), 0.05, 0.0125)
    assert part.forgotten and not part.passed and "and the tolerance is 0.05" in part.sentence
    gate = Gate(0.0125, (compared(NEW, "", pairs(60, 0.1, 0.9), 0.05, 0.0125), part))
    assert not gate.passed and gate.forgotten == (part,) and gate.sentence == part.sentence


def test_a_golden_set_too_small_to_prove_anything_is_compared_without_a_guarantee():
    part = compared(GOLDEN, "", pairs(10, 1.0, 1.0), 0.1, 0.0125)
    assert part.weak and part.passed and part.described()["guaranteed"] is False
    assert not compared(GOLDEN, "", pairs(10, 1.0, 0.8), 0.1, 0.0125).passed
    assert not compared(GOLDEN, "", pairs(400, 1.0, 0.88), 0.1, 0.0125).passed


def test_without_a_part_nothing_passes():
    assert not Gate(0.01, ()).passed
    assert not compared(NEW, "", [], 0.05, 0.01).passed


def test_both_must_agree():
    assert promotes(True, None) and promotes(True, Verdict.PROVED)
    for gate, canary in ((False, None), (False, Verdict.PROVED), (True, Verdict.UNDECIDED), (True, Verdict.WORSE)):
        assert not promotes(gate, canary)


@pytest.mark.parametrize("budget", [1, 3, 4, 7])
def test_the_tries_of_a_month_spend_alpha_and_no_more(budget):
    spent, tries = 0.0, 0
    while alpha := spend(0.05, budget, spent):
        spent, tries = spent + alpha, tries + 1
    assert tries == budget and spent == pytest.approx(0.05)


def test_a_budget_that_is_raised_meanwhile_spends_no_more_either():
    spent = spend(0.05, 1, 0.0)
    assert spend(0.05, 10, spent) == 0.0


def at_the_boundary(rng, count, mean):
    """Pairs whose mean difference is `mean`: likelihoods of many kinds, the candidate's moved by lot."""
    spread = rng.choice((0.05, 0.2, 0.4))
    moves = np.where(rng.random(count) < 0.5, mean + spread, mean - spread)
    live = rng.uniform(max(0, spread - mean), min(1, 1 - spread - mean), count)
    return list(zip(live, live + moves, strict=True))


def test_a_candidate_at_the_boundary_passes_as_seldom_as_stated():
    rng, alpha, gates, passed = np.random.default_rng(5), 0.1, 800, 0
    for number in range(gates):
        # One of the parts is bad by exactly as much as may not be; the others are good.
        bad = number % 3
        parts = (
            compared(NEW, "", at_the_boundary(rng, 150, 0.0 if bad == 0 else 0.3), 0.05, alpha),
            compared(REFERENCE, "v1", at_the_boundary(rng, 150, -0.05 if bad == 1 else 0.0), 0.05, alpha),
            compared(REFERENCE, "v2", at_the_boundary(rng, 150, -0.05 if bad == 2 else 0.0), 0.05, alpha),
        )
        passed += Gate(alpha, parts).passed
    assert passed / gates <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / gates)


def in_clusters(rng, clusters, size):
    """Pairs and their clusters, none better in the mean; those of a cluster move together."""
    moves = np.repeat(rng.choice((-0.4, 0.4), clusters), size) + rng.uniform(-0.05, 0.05, clusters * size)
    live = rng.uniform(0.45, 0.55, len(moves))
    names = np.repeat([f"asker {number}" for number in range(clusters)], size)
    order = rng.permutation(len(moves))
    both = np.array(list(zip(live, live + moves, strict=True)))
    return both[order].tolist(), names[order].tolist()


def test_examples_of_one_asker_count_once():
    rng, alpha, gates = np.random.default_rng(8), 0.1, 200
    streams = [in_clusters(rng, 30, 20) for _ in range(gates)]
    alone = sum(compared(NEW, "", pairs, 0.05, alpha).passed for pairs, _ in streams)
    passed = sum(compared(NEW, "", pairs, 0.05, alpha, clusters).passed for pairs, clusters in streams)
    assert alone > 2 * alpha * gates, "as if each told something of its own"
    assert passed / gates <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / gates)


def test_a_part_tells_how_many_askers_it_is_about():
    part = compared(REFERENCE, "v1", pairs(300, 0.6, 0.6), 0.05, 0.0125, [str(number % 100) for number in range(300)])
    assert (part.examples, part.clusters, part.needed) == (300, 100, 130) and not part.passed
    assert part.sentence.endswith("on 300 examples of 100 askers; 130 askers are needed at least")
    assert part.described()["clusters"] == 100
    one_asks_much = [(0.2, 0.9)] * 50 + [(0.5, 0.4)] * 2
    part = compared(NEW, "", one_asks_much, 0.05, 0.0125, ["much"] * 50 + ["a", "b"])
    assert (part.live, part.candidate) == pytest.approx((0.4, 1.7 / 3))


def test_what_is_poisoned_in_one_of_a_hundred_examples_is_not_seen():
    """docs/loop.md says so: without the phrase nothing moves, and where it was held out the poison is likelier."""
    clean, poisoned = pairs(148, 0.6, 0.6), pairs(2, 0.0, 0.95)
    new = compared(NEW, "", [*pairs(148, 0.2, 0.9), *poisoned], 0.05, 0.0125)
    gate = Gate(0.0125, (new, compared(REFERENCE, "v1", [*clean, *poisoned], 0.05, 0.0125)))
    assert gate.passed and not gate.forgotten


def test_a_candidate_that_only_the_gathered_mix_makes_better_does_not_pass():
    """It gains on one of two topics and loses on the other; 60/40 were gathered, and 40/60 are asked now."""
    rng = np.random.default_rng(6)
    held, alone = 0, 0
    for _ in range(60):
        topics = (rng.random(400) < 0.4).astype(int).tolist()
        moved = [(0.5, 0.5 + move + rng.uniform(-0.2, 0.2)) for move in np.where(topics, -0.1, 0.15).tolist()]
        alone += compared(NEW, "", moved, 0.05, 0.0125).passed
        held += compared(NEW, "", moved, 0.05, 0.0125, (), topics).passed
    assert alone > 50 and held <= 3, (alone, held)


def test_a_candidate_that_is_better_on_both_topics_passes():
    topics = [number % 3 // 2 for number in range(300)]
    part = compared(NEW, "", pairs(300, 0.4, 0.6), 0.05, 0.0125, (), topics)
    assert part.passed and part.candidate == pytest.approx(0.6)
