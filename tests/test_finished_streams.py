"""A campaign of streams that is stopped goes on where it was, and its bounds are exact."""

from __future__ import annotations

import pytest

from tests.campaigns.finished_streams import FinishedStreams, by_turns, digest, interval


def work(kind: str, seed: int) -> dict:
    return {"false": kind == "odd" and seed % 2 == 1}


def test_finished_streams_are_not_run_again(tmp_path):
    file = tmp_path / "streams.jsonl"
    FinishedStreams(file, "this code").run(by_turns(["odd", "even"], 2, 0), work)
    with file.open("a") as out:
        out.write('{"code": "this co')  # killed while it wrote
    again = FinishedStreams(file, "this code")
    assert [line["false"] for line in again.of("odd")] == [False, True]
    again.run(by_turns(["odd", "even"], 3, 0), work)
    lines = FinishedStreams(file, "this code").lines
    assert sorted((line["seed"], line["kind"]) for line in lines) == sorted(
        (n, k) for n in range(3) for k in ("even", "odd")
    )
    assert FinishedStreams(file, "other code").of("odd") == []


def test_streams_of_another_length_are_other_streams():
    assert digest("serve/drift", requests=3000) != digest("serve/drift", requests=20_000)
    assert digest("serve/drift", requests=3000) == digest("serve/drift", requests=3000)


def test_each_kind_has_its_turn():
    assert by_turns(["a", "b"], 2, 7) == [("a", 7), ("b", 7), ("a", 8), ("b", 8)]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 100, 0.0, 0.0362), (1, 100, 0.0003, 0.0545), (5, 50, 0.0333, 0.2181), (10, 10, 0.6915, 1.0)],
)
def test_the_bounds_are_those_of_clopper_and_pearson(hits, n, low, high):
    assert interval(hits, n) == pytest.approx((low, high), abs=1e-4)
