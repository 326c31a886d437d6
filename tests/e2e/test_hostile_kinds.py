"""Uploads of every kind of adapter with one thing wrong, and mixtures that are none, are refused for just that.

Nobody else hears of them: another adapter's and the base's answers stay the same to the bit.
"""

from __future__ import annotations

import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.crowd import memory
from tests.support.hostile_adapters import CATALOGUE, CONVERTED, Upload, dora, head, lora, words, wrong
from tests.support.server import BASE, Answer, Server, bearer, done, refused
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = ("The capital of France is", "Once upon a time there was a baker who carried " + "bread " * 30, "Hello")
# MiB that a second round of the same uploads may leave behind.
LEFT_BEHIND = 32


def push(server: Server, name: str, upload: Any, **more: str) -> httpx.Response:
    return server.push([("files", (file, data)) for file, data in upload.files().items()], name=name, **more)


def said(server: Server, *models: str) -> list[Any]:
    """What each answers by itself and without the cache: tokens, with the log-probabilities of the likeliest."""
    answers = []
    body = {"max_tokens": 6, "temperature": 0, "logprobs": 5, "ignore_eos": True, "return_token_ids": True}
    for model in models:
        for prompt in PROMPTS:
            asked = {**body, "model": model, "prompt": prompt, "cache_salt": uuid.uuid4().hex}
            choice = done(server.http.post("/v1/completions", json=asked))["choices"][0]
            answers.append((choice["token_ids"], choice["logprobs"]["top_logprobs"]))
    return answers


def misses(server: Server, name: str, kind: str) -> dict[str, tuple[int, str]]:
    """Push everything that is wrong of a kind; what came back where it is no refusal for that."""
    missed = {}
    for number, each in enumerate(CATALOGUE[kind][1]):
        answer = push(server, name, wrong(kind, number))
        error = answer.json().get("error", {})
        text = " | ".join([error.get("message", ""), *error.get("problems", [])])
        if answer.status_code not in (413, 422) or not re.search(each.says, text):
            missed[each.what] = (answer.status_code, text[:600])
    return missed


@pytest.mark.parametrize("kind", CATALOGUE)
def test_an_upload_with_one_thing_wrong_is_refused_for_that(server: Server, voice, name, kind):
    before = said(server, voice, BASE)
    assert push(server, name, CATALOGUE[kind][0]()).status_code == 201, "its sound one is taken"
    stored, versions, restarts = server.stored(), server.adapter(name)["versions"], server.engine()["restarts"]
    assert not misses(server, name, kind)
    assert eventually(lambda: server.stored() == stored), "something of one is kept"
    assert server.adapter(name)["versions"] == versions
    assert server.engine()["restarts"] == restarts
    assert said(server, voice, BASE) == before


def test_refused_uploads_leave_no_memory_behind(server: Server, voice, name):
    kinds = [kind for kind in CATALOGUE if kind not in CONVERTED]
    rounds = []
    for _ in range(2):
        for kind in kinds:
            misses(server, name, kind)
        rounds.append(memory(server))
    assert rounds[1] < rounds[0] + LEFT_BEHIND


@pytest.fixture
def parts(server: Server):
    """Adapters that are there, by what they are; they go with the test."""
    made: dict[str, Any] = {"left": lora(1), "right": lora(2), "wide": lora(3, rank=13), "loud": loud()}
    made |= {"dora": dora(), "head": head(), "words": words()}
    names = {part: f"hostile-{part}" for part in made}
    for part, upload in made.items():
        done(push(server, names[part], upload))
    yield names
    for part in names.values():
        server.http.delete(f"/v1/adapters/{part}?force=true")
    assert eventually(lambda: not any(server.resident(part) for part in names.values()))


def loud() -> Upload:
    """In halves, one of which is near the largest that there is; where it is multiplied there is nothing."""
    made = lora(4)
    made.tensors = {name: values.astype(np.float16) for name, values in made.tensors.items()}
    first = next(iter(made.tensors)).removesuffix(".lora_A.weight")
    made.tensors[f"{first}.lora_A.weight"][0] = 0
    made.tensors[f"{first}.lora_B.weight"][:, 0] = 60_000
    return made


@pytest.fixture
def acme(server: Server):
    """Another tenant, who has an adapter of its own."""
    asked = {"tenant": "acme", "name": "mixtures", "scopes": ["adapters:write", "inference"]}
    key = done(server.http.post("/v1/keys", json=asked))
    with httpx.Client(base_url=server.url, headers=bearer(key["secret"]), timeout=120) as client:
        files = [("files", (file, data)) for file, data in lora(5).files().items()]
        done(client.post("/v1/adapters", data={"name": "own"}, files=files))
        yield client
        client.delete("/v1/adapters/own?force=true")
    server.http.delete(f"/v1/keys/{key['id']}")


def test_a_mixture_with_one_thing_wrong_is_refused_for_that(server: Server, voice, parts, acme):
    left, right = parts["left"], parts["right"]
    before = said(server, voice, BASE)
    sound, alone = said(server, f"{left}:0.5+{right}:0.5"), said(server, left)
    assert sound != alone, "its sound one is taken"
    stored, restarts = server.stored(), server.engine()["restarts"]
    for model, status, says in (
        (f"{left}:0.5+{right}x:0.5", 404, "does not exist"),
        (f"{left}:0.5+{right}@v9:0.5", 404, "does not exist"),
        (f"{left}:0.5+{right}:nan", 400, "is no part of a mixture: write NAME or NAME:WEIGHT"),
        (f"{left}:0.5+{right}:inf", 400, "is no part of a mixture: write NAME or NAME:WEIGHT"),
        (f"{left}:0.5+{right}:1e1", 400, "is no part of a mixture: write NAME or NAME:WEIGHT"),
        (f"{left}:0.5+{right}:100.1", 400, "it must be from -100 to 100"),
        (f"{left}:0.5+{right}:0", 400, "and not 0: leave it out instead"),
        (f"{left}:0.5+", 400, "is no part of a mixture: write NAME or NAME:WEIGHT"),
        (f"{left}:0.5+{left}:-0.5", 400, "add up to nothing"),
        (f"{left}:0.5" + f"+{right}:0.5" * 8, 400, "up to 8 adapters, not 9"),
        (f"{left}:0.5" + f"+{right}:0.5" * 10_000, 400, "up to 8 adapters, not 10001"),
        (f"{left}:0.5+{parts['wide']}:0.5", 400, "4 = 17, and this engine takes up to 16|13 = 17, and this engine"),
        (f"{left}:0.5+{BASE}:0.5", 400, "is a base model"),
        (f"{left}:0.5+{parts['dora']}:0.5", 422, "is a DoRA"),
        (f"{left}:0.5+{parts['head']}:0.5", 422, "a table or a head of its own"),
        (f"{left}:0.5+{parts['words']}:0.5", 422, "a table or a head of its own"),
        (f"{parts['loud']}:100", 422, "are not finite numbers any more"),
    ):
        asked = server.http.post("/v1/completions", json={"model": model, "prompt": "Hello", "max_tokens": 2})
        message = refused(asked, status)
        assert re.search(says, message), (model[:80], message)
        kept = server.http.post(f"/v1/adapters/{left}-kept/mix", json={"adapters": model.split("+")})
        assert 400 <= kept.status_code < 500, (model[:80], kept.text)
    for listed in ('"weight": NaN', '"weight": 1e999', '"weight": "1"', '"weight": true', '"scale": 1'):
        body = f'{{"prompt": "x", "adapters": [{{"name": "{left}"}}, {{"name": "{right}", {listed}}}]}}'
        asked = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert asked.status_code == 400, (listed, asked.text)
    theirs = acme.post("/v1/completions", json={"model": f"own:0.5+default/{left}:0.5", "prompt": "Hello"})
    assert "does not exist" in refused(theirs, 404)
    assert server.http.get(f"/v1/adapters/{left}-kept").status_code == 404
    assert eventually(lambda: server.stored() == stored)
    assert server.engine()["restarts"] == restarts
    assert said(server, f"{left}:0.5+{right}:0.5") == sound
    assert said(server, voice, BASE) == before


def test_a_part_that_is_deleted_under_traffic_takes_no_answer_along(server: Server, voice, parts):
    mixture = f"{parts['left']}:0.5+{parts['right']}:0.5"
    wanted, before = server.ask(mixture, tokens=120, ignore_eos=True).text, said(server, voice)
    gate = threading.Barrier(5)

    def answered() -> Answer:
        answer = Answer()
        pieces = server.answering(
            answer, mixture, tokens=120, question="What is the capital of France?", ignore_eos=True
        )
        next(pieces)
        gate.wait(60)
        for _ in pieces:
            pass
        return answer

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(answered) for _ in range(4)]
        gate.wait(60)
        done(server.http.delete(f"/v1/adapters/{parts['left']}?force=true"))
        body = {"model": mixture, "prompt": "Hello", "max_tokens": 2}
        assert "does not exist" in refused(server.http.post("/v1/completions", json=body), 404)
    for answer in (future.result() for future in answers):
        assert answer.done and answer.finish == "length" and len(answer.text) > 0.5 * len(wanted)
    # Other weights under the name: nothing of the mixture before is left.
    done(push(server, parts["left"], lora(6)))
    anew = said(server, mixture)
    done(server.http.delete(f"/v1/adapters/{parts['left']}?force=true"))
    done(push(server, parts["left"], lora(1)))
    assert said(server, mixture) != anew
    assert server.ask(mixture, tokens=120, ignore_eos=True).text == wanted
    assert said(server, voice) == before
