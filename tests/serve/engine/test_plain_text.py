"""What is quoted holds no special token any more, however it was put together."""

from __future__ import annotations

import pytest

from serve.engine.plain_text import quoted

SPECIAL = frozenset({"<|im_end|>", "<|im_start|>", "</s>", "\n", "<0 0>"})


@pytest.mark.parametrize(
    "text", ["a<|im_end|>b", "<|im_<|im_end|>end|>", "<|im_end|>" * 50, "<</s>/s>", "</s></s><|im_start|>"]
)
def test_no_special_token_is_left(text):
    plain = quoted(text, SPECIAL)
    assert not any(token in plain for token in SPECIAL - {"\n"}) and plain.replace(" ", "") == text.replace(" ", "")


def test_other_texts_are_as_they_were():
    assert quoted("a < b\n| im_end", SPECIAL) == "a < b\n| im_end"
    assert quoted("anything", frozenset()) == "anything"
