"""What is plain about one answer."""

from __future__ import annotations

import math

import pytest

from serve.asgi.exchange import Generation
from serve.drift.answer_facts import KINDS, answer_facts, asks_json, block_facts, first_hits, other_language, spoken


def facts(output=range(100), text="The station is behind the market, and the train leaves at nine.", reason="stop",
          tokens=0, json=False, language="en"):  # fmt: skip
    generation = Generation([1], list(output), reason, text)
    return answer_facts(generation, tokens, asks_json=json) | other_language(spoken(text), language)


def test_a_plain_answer_has_nothing_of_all_this():
    plain = facts()
    assert set(plain) | set(block_facts([plain])) == set(KINDS) and plain["no_json"] is None
    assert [plain[name] for name in ("refusal", "ended_by_length", "repetition", "other_language")] == [0, 0, 0, 0]
    assert plain["longer"] == plain["shorter"] == math.log1p(100)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("refusal", {"text": "I'm sorry, but I cannot help with that."}),
        ("ended_by_length", {"reason": "length"}),
        ("ended_by_length", {"tokens": 64}),
        ("repetition", {"output": [*range(50), *[7, 8, 9] * 50]}),
        ("other_language", {"text": "Der Bahnhof ist hinter dem Markt und der Zug fährt um neun."}),
        ("other_language", {"language": "de"}),
        ("no_json", {"json": True}),
    ],
)
def test_each_is_told(name, change):
    assert facts(**change)[name] == 1.0


def test_what_cannot_be_told_is_left_open():
    assert facts(text="42")["other_language"] is None and facts(language="")["other_language"] is None
    assert facts(text="")["refusal"] is None, "a call of a tool has no text"
    assert facts(json=True, text='{"a": 1}')["no_json"] == 0.0
    assert facts(json=True, text='{"a"', reason="length")["no_json"] is None, "it was cut off, which is told apart"
    assert facts(output=[7] * 20)["repetition"] == 0.0, "too short for a loop"


def test_of_answers_that_belong_together_the_mean_length_counts():
    block = [facts(), facts(text="I'm sorry, no."), facts(text="")]
    assert block_facts(block) == dict.fromkeys(("longer_later", "shorter_later"), pytest.approx(facts()["longer"]))
    assert block_facts([{"longer": None}]) == {"longer_later": None, "shorter_later": None}


def test_of_answers_that_belong_together_each_counts_until_one_is_refused():
    refused = facts(text="I'm sorry, no.")
    assert first_hits([refused])["refusal"] == first_hits([facts(), refused])["refusal"] == 1
    again = first_hits([refused, facts(), refused])
    assert again["refusal"] is None and again["repetition"] == 0


@pytest.mark.parametrize(
    ("question", "wants"),
    [
        (None, False),
        ({"messages": []}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"text": {"format": {"type": "json_schema"}}}, True),
        ({"text": "plain"}, False),
    ],
)
def test_who_asks_for_json(question, wants):
    assert asks_json(question) is wants
