"""Examples fall into two topics by the words of what is asked."""

from __future__ import annotations

from serve.loop.likelihood import Example
from serve.loop.topics import topics

COOKING = "How long do I {} the {} in the oven for this recipe, with butter and salt?"
BANKING = "Which interest does the bank take for a {} loan when the {} account is empty?"


def asked(text):
    return Example({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "So."}]})


def test_two_topics_are_told_apart_whatever_their_order():
    some = [
        COOKING.format(one, two) for one in ("bake", "roast", "warm") for two in ("bread", "chicken", "cake", "pie")
    ]
    others = [BANKING.format(one, two) for one in ("car", "house") for two in ("second", "joint", "savings")]
    texts = [text for pair in zip(some, others, strict=False) for text in pair] + some[len(others) :]
    found = topics([asked(text) for text in texts])
    assert set(found) == {0, 1}
    assert {(number, text in some) for number, text in zip(found, texts, strict=True)} in (
        {(0, True), (1, False)},
        {(1, True), (0, False)},
    )


def test_examples_without_text_or_difference_have_one_topic():
    assert topics([]) == [] and topics([asked("Hello there")]) == [0]
    assert len(set(topics([asked("Hello there friend")] * 5))) == 1
    assert len(topics([Example({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), asked("Hi")])) == 2
