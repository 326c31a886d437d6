"""What an answer is worth, and what a score says about other cases."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest

from serve.rollout.golden.golden_schema import SECONDS
from serve.rollout.golden.golden_scoring import Result, estimate, score
from serve.rollout.golden.golden_set import GoldenCase

CITY = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string", "pattern": "^[A-Z]"}}}


def case(**expected):
    return msgspec.convert({"prompt": "x", **expected}, GoldenCase)


@pytest.mark.parametrize(
    ("expected", "answer", "value"),
    [
        ({"equals": "4"}, " 4\n", 1.0),
        ({"equals": "4"}, "4.", 0.0),
        ({"contains": "Paris"}, "It is Paris.", 1.0),
        ({"contains": "Paris"}, "It is paris.", 0.0),
        ({"regex": r"\b\d{4}\b"}, "in 1969", 1.0),
        ({"regex": r"^\d{4}$"}, "in 1969", 0.0),
        ({"json_schema": CITY}, ' {"city": "Rome"}', 1.0),
        ({"json_schema": CITY}, '{"city": "rome"}', 0.0),
        ({"json_schema": CITY}, '{"town": "Rome"}', 0.0),
        ({"json_schema": CITY}, "Rome", 0.0),
        ({"json_schema": CITY}, "[" * 100_000, 0.0),
        ({"json_schema": {"multipleOf": 1.5}}, "3.0", 1.0),
        ({"json_schema": {"multipleOf": 1.5}}, "Infinity", 0.0),
        ({"json_schema": {"multipleOf": 1.5}}, "NaN", 0.0),
        ({"json_schema": {"multipleOf": 0.1}}, "1" + "0" * 4000, 0.0),
        ({"json_schema": {"uniqueItems": True}}, '[1, true, "1", null, [1], {"a": 1}, [[true]], {"a": true}]', 1.0),
        ({"json_schema": {"uniqueItems": True}}, '[1, "a", 1.0]', 0.0),
        ({"json_schema": {"uniqueItems": True}}, '[{"a": [1], "b": 2}, {"b": 2.0, "a": [1]}]', 0.0),
        ({"json_schema": {"uniqueItems": False}}, "[1, 1]", 1.0),
        (
            {"json_schema": {"uniqueItems": True, "type": "array"}},
            str([[n % 7, {"a": n}] for n in range(3000)]).replace("'", '"'),
            1.0,
        ),
    ],
)
def test_an_answer_passes_or_fails(expected, answer, value):
    assert score(case(**expected), answer).value == value


def test_a_pattern_or_schema_that_takes_for_ever_is_an_error_of_the_case_and_not_of_the_version():
    slow = score(case(regex="(a|aa)+$"), "a" * 60 + "b")
    assert (slow.value, slow.result) == (None, Result.ERROR) and "takes longer" in slow.detail
    levels = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    began = time.thread_time()
    branching = score(case(json_schema={"$defs": {**levels, "a40": {}}, "$ref": "#/$defs/a0"}), "{}")
    assert branching.value is None and "takes longer" in branching.detail
    assert time.thread_time() - began < 10 * SECONDS
    inner = score(case(json_schema={"properties": {"a": {"pattern": "(a|aa)+$"}}}), f'{{"a": "{"a" * 60}b"}}')
    assert inner.value is None


def test_the_interval_of_passes_and_fails_is_wilsons():
    half = estimate([1.0] * 5 + [0.0] * 5)
    assert (half.method, round(half.low, 4), round(half.high, 4)) == ("wilson", 0.2366, 0.7634)
    whole = estimate([1.0] * 20)
    assert whole.high == 1.0 and 0.83 < whole.low < 0.84, "twenty passes do not say that all pass"


def test_few_graded_scores_say_nothing_about_others():
    assert (estimate([0.5, 0.7]).low, estimate([0.5, 0.7]).high) == (0.0, 1.0)
    assert estimate([]).score is None


def test_the_interval_of_graded_scores_holds_the_mean_as_often_as_it_says():
    lots = np.random.default_rng(5)
    holds = 0
    for _ in range(400):
        now = estimate(lots.beta(4, 2, 12).tolist())
        holds += now.low <= 4 / 6 <= now.high
    assert 0.91 <= holds / 400 <= 0.98, holds
