"""Loaded means that it changes the output."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from serve.config import load
from serve.engine.effect_probe import effect
from serve.errors import ConfigError
from tests.support.app import upload
from tests.support.rounding import KINDS, admitted, alarms


async def test_what_an_upload_changes_is_measured_and_kept(client, backend, make_adapter):
    pushed = (await client.post("/v1/adapters", **upload(make_adapter()))).json()
    assert pushed["checks"] == {"effect": 0.5, "effect_needed": 0.08, "base_model": backend.model}
    shown = (await client.get("/v1/adapters/tone")).json()
    assert shown["versions"][0]["checks"] == pushed["checks"]


async def test_an_adapter_that_loads_and_changes_nothing_is_refused_and_leaves_nothing(
    client, backend, config, make_adapter
):
    backend.effects["tone"] = 0.01
    refused = await client.post("/v1/adapters", **upload(make_adapter()))
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["code"] == "no_effect"
    assert "0.0100" in error["message"] and "0.0800" in error["message"]
    assert (await client.get("/v1/adapters")).json()["data"] == []


async def test_one_push_may_ask_for_less_effect_and_the_refusal_says_how(client, backend, make_adapter):
    backend.effects["tone"] = 0.01
    message = (await client.post("/v1/adapters", **upload(make_adapter()))).json()["error"]["message"]
    assert "probe_min_effect below 0.0100 (`loradock adapters push --probe-min-effect`)" in message
    for odd in ("-1", "much", "nan"):
        refused = await client.post("/v1/adapters", **upload(make_adapter(), probe_min_effect=odd))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "probe_min_effect")
    taken = await client.post("/v1/adapters", **upload(make_adapter(), probe_min_effect="0.005"))
    assert (taken.status_code, taken.json()["checks"]["effect_needed"]) == (201, 0.005)
    backend.effects["other"] = 0.0
    none = await client.post("/v1/adapters", **upload(make_adapter(1), name="other", probe_min_effect="0"))
    assert none.status_code == 422 and "push it with" not in none.json()["error"]["message"]


async def test_an_adapter_that_names_another_base_is_taken_with_a_warning(client, make_adapter):
    warnings = []
    for seed, base in enumerate(["toy", "./base", "team/Base", "meta-llama/Llama-3.1-8B"]):
        folder = make_adapter(seed)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        pushed = await client.post("/v1/adapters", **upload(folder))
        assert pushed.status_code == 201, pushed.text
        warnings.append(pushed.json()["checks"].get("warning"))
    assert warnings[:3] == [None, None, None]
    assert warnings[3].startswith("it says that it was trained on meta-llama/Llama-3.1-8B; its shapes fit base")


async def test_an_adapter_that_overflows_is_refused(client, backend, make_adapter):
    backend.effects["tone"] = math.nan
    refused = await client.post("/v1/adapters", **upload(make_adapter()))
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_finite")
    backend.effects["tone"] = 1e30  # beside which no token's own number is left
    flat = (await client.post("/v1/adapters", **upload(make_adapter()))).json()["error"]
    assert flat["code"] == "not_finite" and "tokens are all as likely: its weights overflow" in flat["message"]


async def test_an_adapter_that_ruins_a_plain_text_is_refused_where_a_bound_is_set(
    connect, config, backend, make_adapter
):
    async with connect(replace(config, probe_max_perplexity=4.0)) as client:
        backend.effects |= {"wild": 2.0, "mild": 1.0}
        wild = await client.post("/v1/adapters", **upload(make_adapter(0), name="wild"))
        mild = await client.post("/v1/adapters", **upload(make_adapter(1), name="mild"))
    assert (wild.status_code, wild.json()["error"]["code"]) == (422, "perplexity")
    assert "7.39 times" in wild.json()["error"]["message"]
    assert mild.json()["checks"]["perplexity_ratio"] == pytest.approx(math.e, abs=1e-3)


async def test_without_the_probe_an_upload_is_only_inspected(connect, config, backend, make_adapter):
    backend.effects["tone"] = 0.0
    async with connect(replace(config, probe=False)) as client:
        assert (await client.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
    assert backend.probes == []


async def test_the_base_is_measured_once_and_not_for_each_upload(client, backend, make_adapter):
    measured = backend.probes.count(None)
    for seed in range(3):
        await client.post("/v1/adapters", **upload(make_adapter(seed)))
    assert backend.probes.count(None) == measured


async def test_a_base_that_differs_from_itself_asks_for_more(connect, config, backend, make_adapter, monkeypatch):
    probe, calls = backend.probe, 0

    async def noisy(adapter_id, prompts):
        nonlocal calls
        calls += 1
        noise = 0.4 * (calls % 3)
        return [{token: value + noise for token, value in one.items()} for one in await probe(adapter_id, prompts)]

    monkeypatch.setattr(backend, "probe", noisy)
    async with connect(config) as client:
        refused = await client.post("/v1/adapters", **upload(make_adapter()))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, "no_effect")
    assert float(re.search(r"and ([0-9.]+) is needed", error["message"])[1]) > 0.08


async def test_a_small_effect_is_held_against_what_the_base_differs_by_beside_traffic(
    client, backend, make_adapter, monkeypatch
):
    """On a GPU the batch's size chooses the kernels: measured idle, the base equals itself."""
    probe, asked = backend.probe, []

    async def beside_traffic(adapter_id, prompts):
        asked.append(adapter_id)
        return [{token: value + 0.15 for token, value in one.items()} for one in await probe(adapter_id, prompts)]

    monkeypatch.setattr(backend, "probe", beside_traffic)
    backend.effects |= {"empty": 0.0, "weak": 0.3}
    refused = await client.post("/v1/adapters", **upload(make_adapter(0), name="empty"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_effect"), "it moved by .15: the traffic"
    backend.effects["weak"] = 0.09
    weak = await client.post("/v1/adapters", **upload(make_adapter(1), name="weak"))
    assert (weak.status_code, weak.json()["checks"]) == (
        201,
        {"effect": 0.09, "effect_needed": 0.08, "base_model": backend.model},
    )
    del asked[:]
    backend.effects["any"] = 0.0
    taken = await client.post("/v1/adapters", **upload(make_adapter(2), name="any", probe="false"))
    assert taken.status_code == 201 and None not in asked, "whoever takes any adapter need not know the noise"


RUNS = range(60)  # `make probe-noise` has a thousand of each, and fainter ones


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nats", [0.0, 0.02, 0.1])
async def test_rounding_neither_refuses_faint_adapters_nor_takes_empty_ones(nats, kind):
    taken = {moves: await admitted(nats, kind, moves, RUNS) for moves in ("0", "0.13", "0.3")}
    assert taken == {"0": 0, "0.13": len(RUNS), "0.3": len(RUNS)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nats", "moved"), [(0.02, 0.0), (0.1, 0.0), (0.1, 0.05)])
async def test_rounding_is_no_drift_and_a_version_that_changed_is(nats, kind, moved):
    raised = {then: await alarms(nats, kind, then, RUNS[:20], moved) for then in ("0.2", "0.9")}
    assert raised == {"0.2": 0, "0.9": 20}


def test_the_effect_is_a_mean_and_a_token_that_fell_out_of_the_list_counts_as_its_end():
    assert effect([{1: -1.0, 2: -2.0}], [{1: -1.5, 2: -2.0}]) == pytest.approx(0.25)
    assert effect([{1: -1.0, 2: -2.0}], [{1: -1.0, 3: -1.8}]) == pytest.approx(0.0)
    assert effect([{1: -1.0, 2: -2.0}], [{3: -4.0, 4: -5.0}]) == pytest.approx(3.5)


@pytest.mark.parametrize(
    "words", [["--probe-min-effect", "-1"], ["--probe=perhaps"], ["--probe-max-perplexity", "nan"]]
)
def test_a_probe_setting_that_makes_no_sense_is_a_sentence(words):

    with pytest.raises(ConfigError, match="probe"):
        load(words, {})
