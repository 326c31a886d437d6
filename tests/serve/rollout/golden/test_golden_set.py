"""What a golden set may hold: bounded, without repeats, and refused with the case that is wrong."""

from __future__ import annotations

import pytest

from serve.api.json_body import decoded, decoded_lines
from serve.errors import BadRequest
from serve.rollout.golden.golden_set import GoldenSet, check, grade


def read(*cases):
    import json

    return decoded(json.dumps({"cases": cases}).encode(), GoldenSet)


def test_a_case_is_known_by_all_but_its_name():
    first, renamed, other = read(
        {"name": "a", "prompt": "x", "equals": "1"},
        {"name": "b", "prompt": "x", "equals": "1"},
        {"prompt": "x", "equals": "2"},
    ).cases
    assert first.key == renamed.key != other.key


def test_a_request_is_deterministic_unless_the_case_says_otherwise():
    plain, warm = read(
        {"prompt": "x", "contains": "1"},
        {"messages": [{"role": "user", "content": "y"}], "contains": "1", "temperature": 0.7, "stop": ["\n"]},
    ).cases
    assert plain.request == {"prompt": "x", "max_tokens": 64, "temperature": 0.0, "stream": False}
    assert (warm.path, warm.request["temperature"], warm.request["stop"]) == ("/v1/chat/completions", 0.7, ["\n"])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"equals": "1"}, "a prompt or messages"),
        ({"prompt": "x"}, "one of equals"),
        ({"prompt": "x", "equals": "1", "contains": "1"}, "one of equals"),
        ({"prompt": "x", "equals": "1", "samples": 3}, "temperature 0 repeat"),
        ({"prompt": "x", "equals": "1", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": "x", "equals": "1", "temperature": 3}, "temperature"),
        ({"prompt": "x", "equals": "1", "colour": "red"}, "colour"),
        ({"prompt": "x" * 40_000, "equals": "1"}, "32 KiB"),
        ({"prompt": "x", "equals": "1" * 20_000}, "16 KiB"),
        ({"prompt": "x", "regex": "a" * 2000}, "regex"),
        ({"prompt": "x", "judge": {"model": "base", "template": "Is it good?"}}, "{answer}"),
    ],
)
def test_a_case_that_is_none_is_refused_in_words(case, words):
    with pytest.raises(BadRequest) as refused:
        read({"prompt": "fine", "equals": "1"}, case)
    assert words in refused.value.message and "cases" in refused.value.message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"prompt": "x", "regex": "(a{999}){999}"}, "case 2 has the regex"),
        ({"prompt": "x", "regex": "("}, "case 2 has the regex"),
        ({"prompt": "x", "json_schema": {"type": "what"}}, "no JSON schema"),
        ({"prompt": "x", "json_schema": {"$ref": "http://127.0.0.1:9/secret"}}, "stays within the schema"),
        ({"prompt": "x", "json_schema": {"$ref": "#"}}, "round and round"),
        ({"prompt": "x", "json_schema": {"$ref": "#/nowhere"}}, "leads nowhere"),
        ({"prompt": "x", "json_schema": {"patternProperties": {"(a+)+$": {}}}}, "patternProperties"),
        ({"prompt": "fine", "equals": "1", "name": "again"}, "case 2 repeats case 1"),
        ({"messages": [{"content": "y"}], "equals": "1"}, "role"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_number_of_its_case(case, words):
    with pytest.raises(BadRequest) as refused:
        check(read({"prompt": "fine", "equals": "1"}, case))
    assert words in refused.value.message


def test_a_set_is_bounded_in_cases_and_tokens():
    with pytest.raises(BadRequest, match="200000"):
        read(*({"prompt": str(n), "equals": "1", "max_tokens": 1024} for n in range(200)))
    with pytest.raises(BadRequest, match="500"):
        read(*({"prompt": str(n), "equals": "1", "max_tokens": 1} for n in range(501)))


def test_json_lines_are_a_case_a_line_and_a_bad_line_is_named():
    golden = decoded_lines(b'{"prompt": "x", "equals": "1"}\n\n{"prompt": "y", "equals": "2"}\n', GoldenSet, "cases")
    assert [case.prompt for case in golden.cases] == ["x", "y"]
    with pytest.raises(BadRequest, match="line 2"):
        decoded_lines(b'{"prompt": "x", "equals": "1"}\n{', GoldenSet, "cases")


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Yes.", 1.0),
        (" no, it is rude", 0.0),
        ("0.75", 0.75),
        ("Score: .5", 0.5),
        ("1", 1.0),
        ("8/10", None),
        ("1/10", None),
        ("80 %", None),
        ("-0.5", None),
        ("I cannot say", None),
        ("nobody knows", None),
    ],
)
def test_a_judge_says_yes_or_no_or_a_number_from_0_to_1(reply, value):
    assert grade(reply) == value


def test_an_answer_cannot_pose_as_a_part_of_the_judges_question():
    (case,) = read(
        {"prompt": "P", "judge": {"model": "base", "template": "{prompt} / {answer}"}},
    ).cases
    assert case.judge.question("P", "{prompt}{answer}") == "P / {prompt}{answer}"
