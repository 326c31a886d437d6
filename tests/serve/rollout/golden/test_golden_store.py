"""Golden sets and outcomes in the registry's database, SQLite's and PostgreSQL's."""

from __future__ import annotations

import msgspec
import pytest

from serve.adapters.registry.registry import Registry
from serve.rollout.golden.golden_scoring import Result, estimate
from serve.rollout.golden.golden_set import GoldenSet
from serve.rollout.golden.golden_store import ANSWER_CHARS, RUNS_KEPT, VERSIONS_KEPT, GoldenStore, Outcome
from tests.support.registry import FOUND


class Clock:
    now = 1000.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        yield registry


@pytest.fixture
def store(registry):
    return GoldenStore(registry, Clock())


def push(registry, number=1):
    return registry.add("tone", FOUND, f"{number:064x}", by="ana")[0]


def golden(*prompts):
    return msgspec.convert({"cases": [{"prompt": prompt, "equals": "y"} for prompt in prompts]}, GoldenSet)


def outcome(case, score=1.0, answer="y", basis="m"):
    result = Result.ERROR if score is None else Result.PASS if score >= 0.5 else Result.FAIL
    return Outcome(case, basis, result, score, answer)


def test_a_set_is_put_read_and_replaced_and_outcomes_of_cases_that_stay_are_kept(registry, store):
    adapter = push(registry)
    first, second = golden("a", "b"), golden("b", "c")
    store.put("tone", first, "ana")
    row, read = store.get("tone")
    assert (read.digest, read.described(), row.who) == (first.digest, first.described(), "ana")
    store.record("tone", adapter.digest, [outcome(case) for case in first.by_key])
    store.put("tone", second, "bob")
    assert set(store.outcomes("tone", adapter.digest)) == set(first.by_key) & set(second.by_key)
    assert store.sets()["tone"].digest == second.digest and store.sets()["tone"].stamp > row.stamp
    assert store.remove("tone") and not store.remove("tone")
    assert store.get("tone") is None and store.outcomes("tone", adapter.digest) == {}


def test_an_answer_that_comes_after_its_set_was_removed_is_not_kept(registry, store):
    adapter = push(registry)
    store.put("tone", golden("a"), "ana")
    store.remove("tone")
    store.record("tone", adapter.digest, [outcome("k")])
    assert store.outcomes("tone", adapter.digest) == {}


def test_the_first_score_stays_and_a_changed_answer_is_counted(registry, store):
    adapter = push(registry)
    store.put("tone", golden("a"), "ana")
    for score, answer in ((1.0, "y"), (1.0, "y"), (0.0, "n")):
        store.record("tone", adapter.digest, [outcome("k", score, answer)])
    kept = store.outcomes("tone", adapter.digest, answers=True)["k"]
    assert (kept.score, kept.first_score, kept.runs, kept.changed, kept.answer) == (0.0, 1.0, 3, 1, "n")
    assert store.outcomes("tone", adapter.digest)["k"].answer == "", "without the answers"


def test_a_sampled_cases_score_is_the_mean_over_its_runs(registry, store):
    adapter = push(registry)
    store.put("tone", golden("a"), "ana")
    for score in (1.0, 0.0, 0.5):
        store.record("tone", adapter.digest, [outcome("k", score)], sampled=["k"])
    kept = store.outcomes("tone", adapter.digest)["k"]
    assert (kept.score, kept.first_score) == (pytest.approx(0.5), 1.0)


def test_an_error_leaves_an_earlier_score_and_another_base_begins_anew(registry, store):
    adapter = push(registry)
    store.put("tone", golden("a"), "ana")
    for new in (outcome("k", None, ""), outcome("k", 0.0, "n"), outcome("k", None, "")):
        store.record("tone", adapter.digest, [new])
    kept = store.outcomes("tone", adapter.digest, answers=True)["k"]
    assert (kept.score, kept.first_score, kept.answer) == (0.0, 0.0, "n")
    store.record("tone", adapter.digest, [outcome("k", 1.0, "y", basis="another model")])
    kept = store.outcomes("tone", adapter.digest)["k"]
    assert (kept.score, kept.first_score, kept.runs) == (1.0, 1.0, 1)


def test_an_answer_is_cut_and_made_of_what_a_database_takes(registry, store):
    adapter = push(registry)
    store.put("tone", golden("a"), "ana")
    store.record("tone", adapter.digest, [outcome("k", 1.0, "\0\ud800" + "x" * 10_000)])
    kept = store.outcomes("tone", adapter.digest, answers=True)["k"].answer
    assert kept.startswith("?x") and len(kept) < ANSWER_CHARS


def test_one_server_at_a_time_runs_a_set_until_its_claim_ends(registry, store):
    push(registry)
    store.put("tone", golden("a"), "ana")
    assert store.claim("tone", "one", 100) and store.claim("tone", "one", 100)
    assert not store.claim("tone", "two", 100)
    store.release("tone", "two")
    assert not store.claim("tone", "two", 100)
    store.release("tone", "one")
    assert store.claim("tone", "two", 5)
    store.clock.now += 10
    assert store.claim("tone", "one", 100)
    assert not store.claim("nobody", "one", 100)


def test_what_is_kept_of_runs_and_versions_is_bounded(registry, store):
    adapter = push(registry)
    store.put("tone", golden("a"), "ana")
    for number in range(RUNS_KEPT + 5):
        store.add_run(adapter, "set", "asked", float(number), 1, estimate([1.0]))
    runs = store.runs("tone")
    assert len(runs) == RUNS_KEPT and runs[0]["began"] == RUNS_KEPT + 4 and runs[0]["score"] == 1.0
    for number in range(VERSIONS_KEPT + 3):
        store.record("tone", f"{number:064x}", [outcome("k")])
    store.prune("tone", [f"{0:064x}"])
    kept = store.digests("tone")
    assert len(kept) == VERSIONS_KEPT + 1 and f"{0:064x}" in kept and f"{1:064x}" not in kept


def test_a_promotion_waits_until_it_is_settled_and_the_latest_one_counts(registry, store):
    first, second = push(registry, 1), push(registry, 2)
    store.hold(first, "ana", "because")
    store.hold(second, "bob", "")
    (held,) = store.held()
    assert (held.name, held.version, held.who) == ("tone", 2, "bob")
    store.settle(held)
    assert store.held() == []
