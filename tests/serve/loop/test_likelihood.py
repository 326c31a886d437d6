"""How likely an answer is, from what vLLM says of a prompt's tokens."""

from __future__ import annotations

import math

import pytest

from serve.loop.likelihood import Example, likelihood

ANSWER = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d", "weight": 1}]}


class Engine:
    """Stands for vLLM: a token is a word, and each of the answer's is as likely as `logprobs` says."""

    def __init__(self, *logprobs):
        self.logprobs, self.asked = logprobs, []

    async def __call__(self, path, fields):
        self.asked.append((path, fields))
        if path == "/tokenize" and "messages" in fields:
            assert all("weight" not in message for message in fields["messages"])
            words = [word for message in fields["messages"] for word in message["content"].split()]
            return {"tokens": [1, *map(ord, words), *([2] if fields["add_generation_prompt"] else [3])]}
        if path == "/tokenize":
            return {
                "tokens": [
                    *([1] if fields.get("add_special_tokens", True) else []),
                    *map(ord, fields["prompt"].split()),
                ]
            }
        ids = fields["prompt"]
        rows = [None, *({str(id): {"logprob": -9.0, "rank": 3}} for id in ids[1 : -len(self.logprobs)])]
        last = zip(ids[-len(self.logprobs) :], self.logprobs, strict=True)
        rows += [{str(id): {"logprob": value, "rank": 1}, "7": {"logprob": -0.1, "rank": 1}} for id, value in last]
        return {"choices": [{"prompt_logprobs": rows}]}


async def test_the_tokens_of_the_answer_alone_count():
    engine = Engine(-0.2, -0.4, -0.6)
    found = await likelihood(Example(ANSWER), engine, 100, {"cache_salt": "x"})
    assert found == pytest.approx(math.exp(-0.4))
    path, fields = engine.asked[-1]
    assert path == "/v1/completions" and fields["prompt_logprobs"] == 0 and fields["cache_salt"] == "x"
    completion = Example({"prompt": "a b", "completion": "c d"})
    assert await likelihood(completion, Engine(-1.0, -2.0), 100, {}) == pytest.approx(math.exp(-1.5))


async def test_what_the_context_has_no_room_for_has_no_score():
    assert await likelihood(Example(ANSWER), Engine(-1.0), 6, {}) is None
    assert await likelihood(Example({"prompt": "a b", "completion": ""}), Engine(-1.0), 100, {}) is None


def test_an_example_is_known_by_what_it_says():
    other = Example({"messages": list(ANSWER["messages"])})
    assert other.digest == Example(ANSWER).digest != Example({"messages": ANSWER["messages"][:1]}).digest
