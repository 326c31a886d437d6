"""Captured requests become examples that a fine-tuning job takes, and everything else is counted in the card."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from optimize.data.examples import checked
from serve.dataset.build import Options, build
from serve.dataset.conversations import Captured
from serve.dataset.datasets import check
from serve.dataset.near import NEIGHBOURS, NearIndex, common_shingles, similarities, sketch
from serve.errors import BadRequest

WORDS = [
    "river",
    "bread",
    "stone",
    "cloud",
    "paper",
    "silver",
    "garden",
    "window",
    "letter",
    "market",
    "winter",
    "mirror",
    "forest",
    "copper",
    "engine",
]
OPTIONS = Options("tone", "default", held_out=0.2, balance=100.0)


def question(number: int) -> str:
    """Questions that have nothing in common."""
    return " ".join(random.Random(number).choices(WORDS, k=20))


def captured(number: int, text: str | None = None, answer: str | None = None, **more) -> Captured:
    asked = more.pop("asked", None) or [{"role": "user", "content": text or question(number)}]
    known = {"rating": 1.0, "correction": None, "finish": "stop", "moment": 1000.0 + number, "asker": f"asker {number}"}
    known |= {"adapter": "tone", "tenant": "default", "version": "v1", "conversation": f"conv-{number}"} | more
    return Captured(id=f"r{number}", asked=asked, answer=answer or f"answer {number}", **known)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path else []


def questions(path) -> set[str]:
    return {line["messages"][-2]["content"] for line in lines(path)}


def test_only_answers_that_somebody_approved_are_learned(tmp_path):
    rows = [captured(number) for number in range(20)]
    rows += [
        captured(20, answer="good bye", rating=0.0),
        captured(21, rating=None),
        captured(22, rating=None, correction="what it should have been"),
        captured(23, finish="length"),
        captured(24, answer="bad", rating=None, correction="better"),
    ]
    built = build(rows, tmp_path / "a", OPTIONS)
    said = [line["messages"][-1]["content"] for path in (built.train, built.held_out) for line in lines(path)]
    assert sorted(said) == sorted([*(f"answer {n}" for n in range(20)), "what it should have been", "better"])
    card = json.loads(built.card.read_text())
    assert card["dropped"] == {"rated_down": 1, "not_approved": 1, "cut_off": 1}
    assert card["captured"] == 25 and sum(card["sources"]["train"].values()) == card["examples"]["train"]
    everything = {**built.described["sources"]["train"]}
    for source, count in built.described["sources"]["held_out"].items():
        everything[source] += count
    assert everything == {"corrected": 2, "rated_up": 20, "unrated": 0}
    also = build(rows, tmp_path / "b", replace(OPTIONS, unrated=True))
    assert "not_approved" not in also.described["dropped"] and also.described["captured"] == 25


def test_jobs_take_what_is_built(tmp_path):
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello you"}]
    chat += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
    rows = [captured(number) for number in range(30)] + [captured(30, asked=chat)]
    rows += [captured(100 + n, question(n), f"worse {n}", rating=0.0) for n in range(30)]
    built = build(rows, tmp_path, OPTIONS)
    for path, method in ((built.train, "supervised"), (built.held_out, "supervised"), (built.preferences, "dpo")):
        found = checked(path, method, fewest=1)
        assert found.problem_count == 0 and found.examples > 0
    learned = [line for line in lines(built.train) + lines(built.held_out) if len(line["messages"]) == 5]
    assert [message.get("weight") for message in learned[0]["messages"]] == [None, None, 0, None, None]


def test_a_better_and_a_worse_answer_to_one_question_are_a_preference(tmp_path):
    rows = [captured(1, "who are you?", "a fish", rating=None, correction="a bird")]
    rows += [captured(2, "what is this?", "a stone", rating=0.0), captured(3, "What is this", "a cloud")]
    rows += [captured(4, "what is this?", "A stone!", rating=0.0), captured(5, "why then?", "because", rating=0.0)]
    built = build(rows, tmp_path, replace(OPTIONS, held_out=0.0))
    pairs = lines(built.preferences)
    assert [(pair["preferred_output"][0]["content"], pair["non_preferred_output"][0]["content"]) for pair in pairs] == [
        ("a bird", "a fish"),
        ("a cloud", "a stone"),
    ]


def test_duplicates_and_near_duplicates_count_once(tmp_path):
    rows = [captured(number) for number in range(10)]
    rows.append(captured(50, question(3).upper() + "?", "another answer"))
    rows.append(captured(51, question(4) + " too", "answer 4"))
    rows.append(captured(52, question(5) + " too", "quite another answer, for which there may be a reason"))
    built = build(rows, tmp_path, replace(OPTIONS, held_out=0.0))
    assert built.described["dropped"] == {"duplicate": 1, "near_duplicate": 1}
    assert built.counts["train"] == 11


def test_a_template_makes_no_duplicates(tmp_path):
    template = "Translate the following sentence into French, keep its tone, and answer with the translation alone: "
    rows = [captured(n, template + " ".join(random.Random(n).choices(WORDS, k=5))) for n in range(60)]
    built = build(rows, tmp_path, replace(OPTIONS, held_out=0.1))
    assert built.described["dropped"] == {}
    assert built.counts["train"] + built.counts["held_out"] == 60


def test_nothing_that_a_golden_set_asks_is_learned(tmp_path):
    rows = [captured(number) for number in range(20)]
    golden = [question(3), [{"role": "system", "content": "be good"}, {"role": "user", "content": question(4) + " ok"}]]
    built = build(rows, tmp_path, OPTIONS, golden=golden)
    assert built.described["dropped"] == {"golden": 2}
    assert not {question(3), question(4)} & (questions(built.train) | questions(built.held_out))


def test_a_conversation_is_never_on_both_sides(tmp_path):
    rows = [captured(number, conversation=f"conv-{number % 20}") for number in range(100)]
    built = build(rows, tmp_path, OPTIONS)
    sides = {text: "train" for text in questions(built.train)} | {text: "out" for text in questions(built.held_out)}
    for conversation in range(20):
        assert len({sides[question(n)] for n in range(100) if n % 20 == conversation}) == 1
    assert built.counts["held_out"] > 0


def test_what_asks_nearly_the_same_as_a_held_out_question_is_not_learned(tmp_path):
    rows = [captured(number) for number in range(40)]
    out = questions(build(rows, tmp_path / "a", OPTIONS).held_out)
    near = [
        captured(100 + at, text + " please", "something that is not an answer") for at, text in enumerate(sorted(out))
    ]
    built = build([*near, *rows], tmp_path / "b", OPTIONS)
    learned, held = questions(built.train), questions(built.held_out)
    assert not any(text + " please" in learned for text in held)
    assert built.described["dropped"]["near_held_out"] > 0


def test_what_an_earlier_build_held_out_is_never_learned(tmp_path):
    rows = [captured(number) for number in range(40)]
    first = build(rows, tmp_path / "a", OPTIONS)
    second = build(rows, tmp_path / "b", replace(OPTIONS, seed=1), before=first.kept_apart)
    assert questions(first.held_out) and not questions(first.held_out) & questions(second.train)
    ids = [conversation.removeprefix("conv-") for conversation, _ in first.kept_apart]
    assert first.held_out_askers == tuple(f"asker {id}" for id in ids)
    again = build(rows, tmp_path / "c", OPTIONS, before=first.kept_apart)
    assert again.digests == first.digests and again.card.read_bytes() == first.card.read_bytes()


def test_the_same_requests_give_the_same_bytes(tmp_path):
    rows = [captured(number, rating=number % 3 / 2) for number in range(60)]
    first = build(rows, tmp_path / "a", OPTIONS)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert build(shuffled, tmp_path / "b", OPTIONS).digests == first.digests
    assert build(rows, tmp_path / "c", replace(OPTIONS, seed=5)).digests != first.digests


def test_personal_data_is_blacked_out_and_counted(tmp_path):
    texts = ["mail jane.doe@example.com or +49 221 1234567", "my IBAN is DE89 3704 0044 0532 0130 00, thanks"]
    rows = [captured(at, text, "card 4111 1111 1111 1111 it is") for at, text in enumerate(texts)]
    built = build(rows, tmp_path, replace(OPTIONS, held_out=0.0))
    said = built.train.read_text()
    assert "mail [redacted] or [redacted]" in said and "IBAN is [redacted], thanks" in said
    assert "card [redacted] it is" in said
    personal = built.described["personal_data"]
    assert personal == {"examples": 2, "blacked_out": {"credit_card": 2, "email": 1, "iban": 1, "phone": 1}}


def test_no_day_topic_or_asker_has_more_than_its_share(tmp_path):
    rows = [captured(number, asker="busy", moment=86_400.0 * 10) for number in range(80)]
    rows += [captured(100 + n, asker=f"rare {n}", moment=86_400.0 * (11 + n)) for n in range(9)]
    built = build(rows, tmp_path, replace(OPTIONS, held_out=0.0, balance=2.0))
    busy = questions(built.train) & {question(n) for n in range(80)}
    assert len(busy) < 20 and len(questions(built.train) - busy) == 9
    assert built.described["dropped"]["balance"] == 80 - len(busy)
    few = build(rows, tmp_path / "few", replace(OPTIONS, held_out=0.0, max_examples=5))
    assert few.counts["train"] == 5 and few.described["dropped"]["limit"] == 84


def test_a_file_has_one_form(tmp_path):
    rows = [captured(number, asked=question(number)) for number in range(8)] + [captured(20), captured(21)]
    built = build(rows, tmp_path, replace(OPTIONS, held_out=0.0))
    assert all(set(line) == {"prompt", "completion"} for line in lines(built.train))
    assert built.described["dropped"] == {"other_form": 2} and built.preferences is None


@pytest.mark.parametrize("limit", [("MOST_REQUESTS", 5), ("MOST_BYTES", 600)])
def test_a_build_looks_at_the_latest_requests_and_no_more(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"serve.dataset.build.{limit[0]}", limit[1])
    rows = [captured(number) for number in reversed(range(40))]
    card = build(rows, tmp_path, Options("tone", "default", held_out=0)).described
    assert card["captured"] + card["dropped"]["limit"] == 40 and 0 < card["captured"] <= 5
    assert card["span"] == {"first": rows[card["captured"] - 1].moment, "last": rows[0].moment}


def test_nothing_captured_gives_a_card_and_no_files(tmp_path):
    built = build([], tmp_path, OPTIONS)
    assert (built.train, built.held_out, built.preferences) == (None, None, None)
    assert built.counts == {"train": 0, "held_out": 0, "preferences": 0} and built.card.exists()


@pytest.mark.parametrize("change", [(5, 1), (40, 4)])
def test_texts_with_few_changes_are_alike_and_others_are_not(change):
    length, changes = change
    found = missed = 0
    for seed in range(60):
        lot = random.Random(seed)
        words = [f"{lot.choice(WORDS)}{lot.randrange(100)}" for _ in range(length * 4)]
        near = [*words]
        for at in lot.sample(range(len(words)), changes):
            near[at] = "other"
        index = NearIndex(common_shingles([]), [sketch(" ".join(words))])
        found += bool(index.near(sketch(" ".join(near))))
        missed += bool(index.near(sketch(" ".join(lot.choices(words, k=length * 2)))))
    assert found >= 57 and missed <= 3


def test_of_many_texts_of_one_template_a_text_is_compared_with_the_nearest_ones(monkeypatch):
    compared = []

    def counted(one, others):
        compared.append(len(others))
        return similarities(one, others)

    monkeypatch.setattr("serve.dataset.near.similarities", counted)
    template = "Translate the following sentence into French, keep its tone, and answer with the translation alone: "

    def text(number: int) -> str:
        return template + " ".join(
            f"{word}{number * 7919 % 1009}" for word in random.Random(number).choices(WORDS, k=12)
        )

    index = NearIndex(common_shingles([]), (sketch(text(number)) for number in range(1000)))
    assert [number for number in range(0, 1000, 25) if number not in index.near(sketch(text(number) + " too"))] == []
    assert max(compared) == NEIGHBOURS


def test_texts_without_letters_are_alike_only_when_equal():
    index = NearIndex(common_shingles([]), [sketch("???"), sketch("日本")])
    assert index.near(sketch("???")) == [0] and index.near(sketch("!!!")) == [] and index.near(sketch("日本")) == [1]


def test_options_that_cannot_be_are_refused():
    for wrong in ({"held_out": 0.7}, {"balance": 0.5}, {"max_examples": 0}, {"since": 5.0, "until": 4.0}):
        with pytest.raises(BadRequest, match=r"takes|until"):
            check(replace(OPTIONS, **wrong))
