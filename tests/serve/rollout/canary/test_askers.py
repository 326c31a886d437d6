"""Conversations are told apart, and stay themselves while they grow."""

from __future__ import annotations

import pytest

from serve.rollout.canary import askers
from serve.rollout.canary.askers import Asker, Askers


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


EXAMPLES = [{"role": "system", "content": "Classify."}, user("2 + 2"), answer("sum"), user("2 * 2"), answer("product")]


def chat(*messages):
    return {"messages": [*messages]}


def of(known, fields, key="k"):
    return known.of(fields, "acme", key)


def test_chats_that_begin_with_the_same_examples_are_different_askers():
    known = Askers()
    keys = [of(known, chat(*EXAMPLES, user(f"{number} - 1"))).key for number in range(20)]
    assert len(set(keys)) == 20, "the first is known by its examples, all others by what comes after them"
    again = [of(known, chat(*EXAMPLES, user(f"{number} - 1"))).key for number in range(20)]
    assert again[1:] == keys[1:] and len({*again}) == 20


def test_a_conversation_after_examples_stays_with_its_asker():
    known = Askers()
    for number in range(2):
        of(known, chat(*EXAMPLES, user(f"{number}")))
    messages, seen = [*EXAMPLES, user("what is 3 - 1?")], []
    for turn in range(5):
        seen.append(of(known, chat(*messages)))
        messages += [answer(f"{turn}"), user(f"and {turn} - 1?")]
    assert {asker.key for asker in seen} == {seen[0].key}
    assert [asker.begins for asker in seen] == [True, False, False, False, False]


def test_a_popular_first_question_is_one_asker_also_when_it_goes_on():
    known = Askers()
    first = of(known, chat(user("hi")))
    for number in range(9):
        later = of(known, chat(user("hi"), answer("hello"), user(f"question {number}")))
        assert later.key == first.key and not later.begins


def test_a_conversation_is_the_same_on_every_server_and_after_a_restart():
    one, other = Askers(), Askers()
    begun = chat({"role": "system", "content": "It is 10:00."}, user("where were we?"))
    longer = chat(
        {"role": "system", "content": "It is 10:01."}, user("where were we?"), answer("here"), user("and then?")
    )
    assert of(one, begun).key == of(other, longer).key == of(Askers(), longer).key
    assert of(one, begun).key != of(one, begun, "another key").key


def test_an_edited_question_does_not_make_its_conversation_another():
    known = Askers()
    begun = of(known, chat(user("tell me a story")))
    for edited in ("longer", "shorter", "sadder"):
        assert of(known, chat(user("tell me a story"), answer("Once"), user(edited))).key == begun.key


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_a_prompt_of_token_ids_and_a_batch_are_known_by_all_of_it(field):
    known = Askers()
    one, other = ([1, *range(100), end] for end in (5, 6))
    for first, second in ((one, other), ([one], [other]), (["a", "b"], ["a", "c"]), ([[1], [2]], [[1], [3]])):
        assert of(known, {field: first}).key != of(known, {field: second}).key
        assert of(known, {field: first}).key == of(known, {field: list(first)}).key
        assert of(known, {field: first}).begins
    long = [*range(50_000)]
    assert of(known, {field: long}).key != of(known, {field: [*long, 1]}).key
    assert of(known, {field: long}).key != of(known, {field: [7, *long[1:]]}).key


@pytest.mark.parametrize("fields", [{"user": "ana"}, {"safety_identifier": "ana"}, {"metadata": {"user_id": "ana"}}])
def test_a_user_is_an_asker_with_many_conversations(fields):
    known = Askers()
    one, other = (of(known, fields | chat(user(text))) for text in ("hello", "goodbye"))
    assert one.key == other.key == of(known, {"user": "ana"}, "another key").key
    assert one.conversation != other.conversation
    later = of(known, fields | chat(user("hello"), answer("hi"), user("so?")))
    assert (later.conversation, later.begins) == (one.conversation, False)
    bo = of(known, chat(user("hello")) | {"user": "bo"})
    assert bo.conversation != one.conversation


def test_who_names_a_stored_response_goes_on_with_its_conversation():
    known = Askers()
    begun = of(known, {"input": "hello"})
    known.remember("resp_1", begun)
    later = of(known, {"input": "and then?", "previous_response_id": "resp_1"})
    assert later == Asker(begun.key, begun.conversation, begins=False)
    assert of(known, {"input": "hello", "previous_response_id": "resp_unknown"}) == begun


def test_no_text_is_kept_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(askers, "OPENINGS", 100)
    monkeypatch.setattr(askers, "RESPONSES", 10)
    known = Askers()
    for number in range(300):
        asker = of(known, chat(user("secret" * 10_000 + str(number)), answer("..."), user("secret")))
        known.remember(f"resp_{number}", asker)
        assert len(asker.key) == len(asker.conversation) == 16
    assert (len(known._openings), len(known._responses)) == (100, 10)
    assert len(of(known, {"user": "long" * 1000, "prompt": "x"}).key) == 16


def test_parts_that_are_deep_or_odd_are_digested_all_the_same():
    deep = "x"
    for _ in range(200):
        deep = [deep]
    odd = [
        deep,
        {"a": {"b": [1.5, None, True]}},
        1 << 200,
        "\ud800",
        {"type": "image_url", "image_url": {"url": "x" * 9999}},
    ]
    keys = {of(Askers(), chat(user(content))).key for content in odd}
    assert len(keys) == len(odd) and None not in keys
