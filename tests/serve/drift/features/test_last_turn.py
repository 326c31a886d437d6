"""What is new in a request is the last message of its user's, whatever stands around it."""

from __future__ import annotations

import numpy as np
import pytest

from serve.drift.features.last_turn import last_turn

OPEN, CLOSE, USER, ASSISTANT, NEWLINE = 1, 2, 10, 11, 12
SYSTEM = {"role": "system", "content": "you are a careful helper of the shop, today is day 17"}


class Text:
    """A tokenizer of words that are numbers."""

    special = frozenset({OPEN, CLOSE})

    def tokens(self, text):
        return [int(word) for word in text.split()]


def said(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("question", "tokens", "position"),
    [
        ({"messages": [said("20 21")]}, [20, 21], 0),
        ({"messages": [SYSTEM, said("20 21"), answer("30"), said("22")]}, [22], 1),
        ({"messages": [answer("30"), said("22")]}, [22], 0),
        ({"messages": [said([{"type": "text", "text": "20"}, {"type": "image_url", "image_url": {}}])]}, [20], 0),
        ({"input": "20 21", "instructions": "be brief"}, [20, 21], 0),
        ({"input": [said([{"type": "input_text", "text": "20"}])]}, [20], 0),
        ({"system": "be brief", "messages": [said("20"), answer("30"), said("21"), answer("31"), said("22")]}, [22], 2),
    ],
)
def test_it_is_the_last_message_of_the_users_in_every_api(question, tokens, position):
    turn = last_turn(question, [1, 2, 3], Text())
    assert turn.tokens.tolist() == tokens and turn.position == position and turn.follows == (position > 0)
    assert not turn.repeats


@pytest.mark.parametrize(
    "step",
    [
        [{"role": "assistant", "tool_calls": [{"id": "a"}]}, {"role": "tool", "content": "40"}],
        [answer(""), {"role": "user", "content": [{"type": "tool_result", "content": "40"}]}],
        [{"type": "function_call", "name": "f"}, {"type": "function_call_output", "output": "40"}],
    ],
)
def test_a_step_of_an_agent_repeats_what_was_asked(step):
    turn = last_turn({"messages": [said("20 21"), *step]}, [1], Text())
    assert turn.repeats and turn.tokens.tolist() == [20, 21] and turn.position == 0


def test_a_follow_up_names_the_message_before_it_also_where_the_history_is_cut_off():
    first = last_turn({"messages": [said("20"), answer("30"), said("21")]}, [1], Text())
    cut = last_turn({"messages": [said("21 "), answer("31"), said("22")]}, [1], Text())
    assert cut.before == first.said and first.before == last_turn({"messages": [said("20")]}, [1], Text()).said


def test_a_system_prompt_is_told_apart_and_its_numbers_do_not_matter():
    def system(text):
        return last_turn({"messages": [{"role": "system", "content": text}, said("20")]}, [1], Text()).system

    base = system(SYSTEM["content"])
    assert len(base) and np.array_equal(base, system(SYSTEM["content"].replace("17", "18")))
    assert not np.intersect1d(base, system("translate every word that comes into French")).size
    assert len(system("brief")) == 1 and len(last_turn({"messages": [said("20")]}, [1], Text()).system) == 0


@pytest.mark.parametrize(
    ("prompt", "turn"),
    [
        # As ChatML has it: each turn is opened by one token, and closed by another.
        ([OPEN, USER, 20, 21, CLOSE, NEWLINE, OPEN, ASSISTANT, NEWLINE], [USER, 20, 21]),
        ([OPEN, USER, 20, CLOSE, OPEN, ASSISTANT, 30, CLOSE, OPEN, USER, 21, CLOSE, OPEN, ASSISTANT], [USER, 21]),
        # As Mistral has it: the answer begins behind a special token.
        ([OPEN, 20, CLOSE, 30, OPEN, 21, 22, CLOSE], [21, 22]),
        ([20, 21, 22], [20, 21, 22]),
        ([OPEN, 20, 21], [OPEN, 20, 21]),
        ([], []),
    ],
)
def test_without_messages_it_is_the_last_turn_of_the_rendered_prompt(prompt, turn):
    for question in (None, {"prompt": "20 21"}):
        found = last_turn(question, prompt, Text())
        assert found.tokens.tolist() == turn and not found.follows and found.system is None


def test_without_a_tokenizer_the_whole_prompt_is_looked_at():
    turn = last_turn({"messages": [said("20"), answer("30"), said("21")]}, [1, 20, 30, 21], None)
    assert turn.tokens.tolist() == [1, 20, 30, 21] and not turn.follows
