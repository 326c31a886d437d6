"""`models`: the first that exists and serves answers, and the answer says which it was."""

from __future__ import annotations

import pytest

from serve.engine.engine import Phase
from serve.gateway.request import MAX_MODELS
from serve.server.assembly import build_app
from tests.support.app import CHAT, Started, push_two, upload
from tests.support.backend import FakeBackend


async def asked(client, path=CHAT, **fields):
    return await client.post(path, json={"messages": [], **fields})


async def test_the_first_model_that_exists_answers(client, backend, make_adapter):
    one, two = await push_two(client, make_adapter)
    for fields, answers in (
        ({"models": ["nobody", "tone@v9", "tone@v2", "tone"]}, two),
        ({"model": "nobody", "models": ["tone"]}, one),
        ({"model": "tone", "models": ["tone@v2"]}, one),
        ({"models": ["tone"]}, one),
        ({"model": "", "models": ["base"]}, "base"),
        ({"model": "tone", "models": None}, one),
    ):
        answer = await asked(client, **fields)
        assert answer.json()["model"] == answers, fields
        assert "models" not in backend.bodies[-1] or backend.bodies[-1]["models"] is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"])
async def test_every_route_takes_them(client, make_adapter, path):
    one, _ = await push_two(client, make_adapter)
    assert (await asked(client, path, models=["nobody", "tone"])).json()["model"] == one


async def test_none_that_exists_is_a_404_that_names_them(client):
    gone = await asked(client, model="nobody", models=["tone@v1"])
    assert gone.status_code == 404
    error = gone.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "models")
    assert "`nobody`, `tone@v1`" in error["message"]


@pytest.mark.parametrize("models", [[], ["x"] * (MAX_MODELS + 1), "tone", [1], [""], {}, [["tone"]], True])
async def test_they_are_a_short_list_of_names(client, backend, models):
    refused = await asked(client, models=models)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "models")
    assert not backend.bodies


async def test_another_error_is_the_answer_and_no_reason_to_ask_the_next(client, backend, make_adapter):
    await push_two(client, make_adapter)
    assert (await asked(client, models=["tone", "base"], priority=-1)).status_code == 400
    backend.broken = (await asked(client, model="tone")).json()["model"]
    client._transport.raise_app_exceptions = False
    assert (await asked(client, models=["tone", "base"])).status_code == 500


async def test_a_key_that_may_not_see_an_adapter_goes_on_to_the_next(issue, make_adapter):
    acme, globex = await issue("acme"), await issue("globex")
    await acme.post("/v1/adapters", **upload(make_adapter()))
    assert (await asked(globex, models=["acme/tone", "base"])).json()["model"] == "base"


async def test_an_engine_that_does_not_serve_is_passed_over_and_the_last_resort_waits(client):
    supervisor = client._transport.app.state.parts.fleet.first
    supervisor.phase = Phase.FAILED
    down = await asked(client, models=["nobody", "base"])
    assert down.status_code == 503, "it exists, and nobody else is named"


async def test_of_two_bases_the_one_that_serves_answers(config, backend, tiny_model):
    second = FakeBackend(str(tiny_model))
    second.name = "second"
    started = Started(config, backend)
    started.app = build_app(config, [backend, second])
    async with started as client:
        assert (await asked(client, models=["base", "second"])).json()["model"] == "base"
        client._transport.app.state.parts.fleet.first.phase = Phase.FAILED
        assert (await asked(client, models=["base", "second"])).json()["model"] == "second"
        assert (await asked(client, model="base")).status_code == 503


async def test_the_guards_are_those_of_the_model_that_answers(client, make_adapter, monkeypatch):
    await push_two(client, make_adapter)
    guarded = []
    forwarder = client._transport.app.state.parts.inference.intake.forwarder
    monkeypatch.setattr(forwarder._router, "names_of", lambda model, caller: guarded.append(model) or [model])
    monkeypatch.setattr(forwarder, "_guards", Unguarded())
    assert (await asked(client, model="nobody", models=["tone@v2", "base"])).status_code == 200
    assert guarded == ["tone@v2"]


class Unguarded:
    def watched(self, names):
        return None
