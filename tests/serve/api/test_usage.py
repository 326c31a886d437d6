"""Who used what in a month: over HTTP, on the command line, and as metrics."""

from __future__ import annotations

import asyncio
import csv
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from serve.asgi.exchange import Generation
from serve.cli import usage as command
from serve.cli.main import app
from serve.config import keys_hashed
from serve.engine.payer import OPERATOR
from serve.telemetry.prices import Price
from tests.support.app import CHAT, issued, upload
from tests.support.waiting import settled


def month() -> str:
    """This one; the run may have begun in the one before."""
    return datetime.now(UTC).strftime("%Y-%m")


@pytest.fixture
async def operator(connect, config, backend):
    backend.generation = Generation([1] * 300, [2] * 50, "stop", cached=100, engine_seconds=0.5)
    prices = (Price(prompt=1.0, cached=0.5, generated=4.0),)
    async with connect(replace(config, admin_keys=keys_hashed(["run"]), prices=prices, currency="CHF")) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


async def test_a_tenant_sees_its_own_usage_and_operators_see_all(operator, make_adapter):
    acme, globex = await issued(operator, "acme"), await issued(operator, "globex")
    await acme.post("/v1/adapters", **upload(make_adapter(0)))
    for client, model, count in ((acme, "tone", 3), (globex, "base", 1)):
        for _ in range(count):
            assert (await client.post(CHAT, json={"model": model})).status_code == 200
    everything = (await operator.get("/v1/usage")).json()
    assert (everything["month"], everything["currency"]) == (month(), "CHF")
    assert [(row["tenant"], row["adapter"]) for row in everything["data"]] == [
        ("acme", "acme/tone"),
        ("globex", "base"),
        (OPERATOR, "base"),
        (OPERATOR, "acme/tone"),
    ]
    assert [row["requests"] for row in everything["data"][:2]] == [3, 1]
    assert everything["total"]["requests"] == sum(row["requests"] for row in everything["data"])
    assert everything["total"]["engine_seconds"] == 2.0
    assert everything["data"][0]["cost"] == pytest.approx(3 * (200 * 1.0 + 100 * 0.5 + 50 * 4.0) / 1e6)
    own = (await acme.get("/v1/usage")).json()
    assert own["data"] == everything["data"][:1]
    assert (await operator.get("/v1/usage", params={"tenant": "globex"})).json()["data"] == everything["data"][1:2]
    assert (await acme.get("/v1/usage", params={"tenant": "globex"})).status_code == 403


@pytest.mark.parametrize("month", ["2026", "2026-13", "november", "2026-11-02", "%"])
async def test_a_month_is_a_year_and_a_month(operator, month):
    refused = await operator.get("/v1/usage", params={"month": month})
    assert refused.status_code == 400 and "2026-11" in refused.json()["error"]["message"]


async def test_a_key_that_only_asks_sees_no_usage(operator):
    assert (await (await issued(operator, "acme", "inference")).get("/v1/usage")).status_code == 403


async def test_what_is_refused_before_the_engine_costs_nothing_and_what_breaks_off_costs_what_was_done(
    operator, backend
):
    acme = await issued(operator, "acme")
    assert (await acme.post(CHAT, json={"model": "nobody"})).status_code == 404
    backend.slow = "base"
    body = {"model": "base", "prompt": "x"}
    assert (await acme.post("/v1/completions", json=body, headers={"X-Request-Timeout": "0.05"})).status_code == 504
    (row,) = (await operator.get("/v1/usage", params={"tenant": "acme"})).json()["data"]
    assert (row["requests"], row["prompt_tokens"], row["generated_tokens"]) == (1, 300, 50)


async def test_usage_outlives_the_server(connect, config, backend):
    async with connect(config) as client:
        await client.post(CHAT, json={"model": "base"})
    async with connect(config) as client:
        await client.post(CHAT, json={"model": "base"})
        usage = await client.get("/v1/usage", params={"tenant": "default"})
        assert usage.json()["total"]["requests"] == 2


async def test_usage_is_counted_as_metrics_too(operator):
    acme = await issued(operator, "acme")
    await acme.post(CHAT, json={"model": "base"})
    text = (await operator.get("/metrics")).text
    labels = 'adapter="base"'
    assert f'loradock_usage_tokens_total{{{labels},kind="cached",tenant="acme"}} 100.0' in text
    assert f'loradock_usage_tokens_total{{{labels},kind="prompt",tenant="acme"}} 200.0' in text
    assert f'loradock_usage_engine_seconds_total{{{labels},tenant="acme"}} 0.5' in text
    assert f'loradock_usage_cost_total{{{labels},currency="CHF",tenant="acme"}}' in text
    assert 'loradock_engine_busy_seconds_total{model="base",use="clients"} 2.0' in text


ANSWER = {
    "month": "2026-11",
    "currency": "EUR",
    "data": [
        {"tenant": "acme", "adapter": "acme/tone", "requests": 3, "prompt_tokens": 900, "cached_tokens": 300,
         "generated_tokens": 150, "engine_seconds": 1.5, "cost": 0.00135},
    ],
    "total": {"requests": 3, "prompt_tokens": 900, "cached_tokens": 300, "generated_tokens": 150,
              "engine_seconds": 1.5, "cost": 0.00135},
}  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    """`loradock usage ...` against a server that answers ANSWER; what it was asked is in `run.asked`."""

    class Server:
        def __init__(self):
            self.asked = []
            self.answer = ANSWER

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def usage(self, month, tenant):
            self.asked.append((month, tenant))
            return self.answer

    server = Server()
    monkeypatch.setattr(command, "connected", lambda *_, **__: server)

    def invoke(*arguments):
        done = CliRunner().invoke(app, ["usage", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    invoke.asked, invoke.server = server.asked, server
    return invoke


def test_without_prices_the_table_says_nothing_of_cost(run):
    free = {"cost": 0.0}
    rows = [{**row, **free} for row in ANSWER["data"]]
    run.server.answer = {**ANSWER, "data": rows, "total": {**ANSWER["total"], **free}}
    table = run("--month", "2026-11").splitlines()
    assert "COST" not in table[0] and table[-1].split()[-1] == "1.5"


def test_the_command_prints_a_table_json_or_csv(run):
    table = run("--month", "2026-11", "--tenant", "acme").splitlines()
    assert run.asked == [("2026-11", "acme")]
    assert table[0].split()[-2:] == ["COST", "EUR"] and table[-1].split()[0] == "total"
    assert json.loads(run("--json")) == ANSWER
    (row,) = csv.DictReader(run("--csv").splitlines())
    assert (row["month"], row["tenant"], row["cost"], row["currency"]) == ("2026-11", "acme", "0.00135", "EUR")


def test_the_command_prints_what_the_tokens_were_for(run):
    (row,) = ANSWER["data"]
    numbers = {name: row[name] for name in row if name not in ("tenant", "adapter")}
    parts = {"request": {**numbers, "requests": 2}, "guard": {**numbers, "requests": 1}}
    run.server.answer = {**ANSWER, "data": [{**row, "causes": parts}]}
    lines = list(csv.DictReader(run("--causes", "--csv").splitlines()))
    assert [(line["cause"], line["requests"]) for line in lines] == [("request", "2"), ("guard", "1")]
    assert run("--causes").splitlines()[0].split()[:4] == ["TENANT", "ADAPTER", "CAUSE", "REQUESTS"]


async def test_the_ledger_is_written_while_nobody_looks(client, monkeypatch):
    parts = client._transport.app.state.parts
    monkeypatch.setattr("serve.telemetry.usage.usage_ledger.WRITE_SECONDS", 0.01)
    await client.post(CHAT, json={"model": "base"})
    writing = asyncio.create_task(parts.usage_ledger.run())
    try:
        rows = await settled(lambda: asyncio.to_thread(parts.usage_ledger.rows, month(), "default"))
    finally:
        writing.cancel()
    assert [(row["adapter"], row["requests"]) for row in rows] == [("base", 1)]
