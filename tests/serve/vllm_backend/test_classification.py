"""What `/classify` answers for an adapter with a head, from the scores that the engine tells."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from starlette.responses import PlainTextResponse

from serve.adapters.saved_modules import Head
from serve.errors import BadRequest
from serve.vllm_backend.classification import Classifications, parameters, probabilities, scores

ONE, EACH = Head(("good", "bad"), independent=False), Head(("rude", "spam"), independent=True)
HEADS = {"mood@1": ONE, "guard@1": EACH}


class Engine:
    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, str | None, int]] = []

    async def score(self, adapter: str, text: Any, salt: str | None, priority: int) -> tuple[list[float], int]:
        self.asked.append((adapter, text, salt, priority))
        return [1.0, 0.0] if text != "bad" else [0.0, 1.0], 4


async def ask(engine: Engine, path: str = "/classify", **fields: Any) -> Any:
    app = Classifications(PlainTextResponse("vLLM's"), HEADS.get, engine.score)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
        return await client.post(path, content=json.dumps(fields))


async def test_each_input_has_its_label_and_probabilities():
    engine = Engine()
    answer = (await ask(engine, model="mood@1", input=["fine", "bad"], cache_salt="a", priority=7)).json()
    assert [row["label"] for row in answer["data"]] == ["good", "bad"]
    assert answer["data"][0]["probs"] == pytest.approx([0.731, 0.269], abs=1e-3)
    assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}
    assert engine.asked == [("mood@1", "fine", "a", 7), ("mood@1", "bad", "a", 7)]


async def test_labels_may_hold_together_and_scores_may_come_as_they_are():
    answer = (await ask(Engine(), model="guard@1", input="fine")).json()
    assert answer["data"][0]["probs"] == pytest.approx([0.731, 0.5], abs=1e-3)
    raw = (await ask(Engine(), model="guard@1", input=[1, 2, 3], use_activation=False)).json()
    assert raw["data"][0]["probs"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "tone@1", "input": "x"}, "tone has no classification head"),
        ({"model": "mood@1"}, "input takes a text"),
        ({"model": "mood@1", "input": []}, "input takes a text"),
        ({"model": "mood@1", "input": ["x", 5]}, "input takes a text"),
        ({"model": "mood@1", "input": {"a": 1}}, "input takes a text"),
        ({"model": "mood@1", "input": "x", "use_activation": 1}, "it must be true or false"),
    ],
)
async def test_what_is_no_question_is_refused_in_a_sentence(fields, reason):
    with pytest.raises(BadRequest, match=reason):
        await ask(Engine(), **fields)


async def test_every_other_route_is_vllms():
    assert (await ask(Engine(), "/v1/completions", model="mood@1")).text == "vLLM's"


async def test_an_error_of_one_input_ends_the_others():
    class Broken(Engine):
        async def score(self, *args: Any) -> tuple[list[float], int]:
            raise BadRequest("too long")

    with pytest.raises(BadRequest, match="too long"):
        await ask(Broken(), model="mood@1", input=["a", "b"])


def test_scores_are_told_as_log_probabilities_beside_a_zero():
    assert parameters(ONE).clone().logprobs == 3
    told = {token: SimpleNamespace(logprob=value) for token, value in ((0, -1.5), (1, -3.0), (2, -2.0))}
    assert scores(ONE, told) == [0.5, -1.0]
    assert probabilities(EACH, [800.0, -800.0]) == pytest.approx([1.0, 0.0])
