"""A version answers captured requests again; what is known of it is said, and no more."""

from __future__ import annotations

from collections import Counter

import pytest

from serve.dataset.replay import Replayed, _agreement, chosen, replay, report
from serve.engine.payer import PROBES
from serve.rollout.golden.golden_runner import Refused
from serve.rollout.golden.golden_scoring import CaseScore
from tests.serve.dataset.test_build import captured


def replayed(number: int, answer: str, **more) -> Replayed:
    request = captured(number, **more)
    return Replayed(request, request.answer, answer, _agreement(request.answer, answer))


def test_what_people_said_something_of_is_asked_first_and_a_conversation_once():
    rows = [captured(n, conversation=f"c{n // 2}", rating=1.0 if n in (0, 3) else None) for n in range(10)]
    rows.sort(key=lambda row: -row.moment)
    assert [row.id for row in chosen(rows, 4)] == ["r3", "r0", "r9", "r7"]


@pytest.mark.parametrize(
    ("said", "answer", "rating"),
    [
        ({"rating": 0.2}, "answer 0", 0.2),
        ({"rating": 0.2}, "ANSWER 0.", 0.2),
        ({"rating": 1.0}, "another", None),
        ({"rating": None}, "answer 0", None),
        ({"rating": None, "correction": "right"}, "Right", 1.0),
        ({"rating": None, "correction": "right"}, "answer 0", 0.0),
        ({"rating": None, "correction": "right"}, "another", None),
    ],
)
def test_an_answer_has_the_rating_that_people_gave_to_these_words(said, answer, rating):
    assert replayed(0, answer, **said).rating == rating


def test_the_mean_rating_is_bounded_by_what_is_not_known():
    some = [replayed(0, "answer 0", rating=1.0), replayed(1, "answer 1", rating=0.0), replayed(2, "new", rating=0.0)]
    some += [replayed(3, "answer 3", rating=None), replayed(4, "right", rating=None, correction="right")]
    ratings = report(some, Counter(), 3)["ratings"]
    assert ratings == {"rated": 4, "given": 0.25, "known": 3, "low": 0.5, "high": 0.75}


def test_the_answers_that_differ_most_are_shown_first():
    some = [replayed(n, f"answer {n}" if n else "nothing alike at all") for n in range(5)]
    told = report(some, Counter(), 2)
    assert [example["request_id"] for example in told["examples"]] == ["r0", "r1"]
    assert told["agreement"]["exact"] == 0.8 and told["requests"] == 5
    empty = report([], Counter(), 2)
    assert empty["agreement"]["edit"] is None and empty["ratings"]["low"] is None and empty["examples"] == []


class Answers:
    """Stands for the engine: says what it is told to, and refuses what is long."""

    def __init__(self):
        self.payers = []

    async def ask(self, adapter, path, fields, payer):
        self.payers.append(payer)
        asked = fields.get("prompt") or fields["messages"][-1]["content"]
        if asked == "too long":
            raise Refused("no room")
        return f"{adapter} on {path[-11:]}: {asked}"

    async def grade(self, judge, tenant, asked, answer, payer):
        return CaseScore(None if asked == "odd" else float(answer.startswith("new")))


class Version(str):
    tenant = "default"


async def test_requests_are_asked_until_nobody_waits_any_more():
    asked = ["one", "too long", "odd", "never asked"]
    requests = [captured(0, asked="one"), *(captured(n, text) for n, text in enumerate(asked[1:], 1))]
    left, answers = iter([True, True, True, False]), Answers()

    async def goes_on():
        return next(left)

    done, refused = await replay(
        answers, Version("new"), requests, against=Version("old"), max_tokens=8, judge=object(),
        payer=PROBES, goes_on=goes_on,
    )  # fmt: skip
    assert [(one.other, one.answer) for one in done] == [
        ("old on completions: one", "new on completions: one"),
        ("old on completions: odd", "new on completions: odd"),
    ]
    told = report(done, refused, 0)
    assert told["refused"] == {"no room": 1} and answers.payers == [PROBES] * 5
    assert told["judge"] == {"requests": 1, "other": 0.0, "candidate": 1.0}
