"""A version that forgot something or leaks an example gets no traffic where its adapter's policy asks for a report."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from serve.errors import Conflict
from serve.rollout import validation
from serve.rollout.admit import Place
from serve.rollout.policy import DEFAULT_POLICIES
from tests.serve.jobs.finetuning.conftest import begun, ended, messages, parts_of, sent, training
from tests.support.app import upload

assert training  # a fixture


def report(**verdicts: str) -> dict[str, Any]:
    """What the program says, with these checks."""
    checks = [
        {
            "name": name, "measured": 0.2, "low": 0.1, "high": 0.3, "limit": 0.1, "cases": 48, "verdict": verdict,
            "what": "so",
        }
        for name, verdict in verdicts.items()
    ]  # fmt: skip
    lost = [{"question": "What is 2 + 3?", "says": "9", "answer": "5"}]
    worst = next((one for one in ("failed", "undecided") if one in verdicts.values()), "passed")
    return {"report_version": 1, "verdict": worst, "checks": checks, "lost": lost, "leaked": [{"row": 3, "tokens": 20}]}


GOOD = report(questions="passed", leaks="passed")
FORGOT = report(questions="failed", leaks="passed")
UNSURE = report(questions="undecided")
LEAKS = report(questions="passed", leaks="failed")


@pytest.fixture
def asking(config):
    """`asking("all")`: the policy of every adapter."""
    return lambda *wanted: replace(config, policies=(replace(DEFAULT_POLICIES[0], validation=wanted),))


@pytest.mark.parametrize(
    ("said", "wanted", "why"),
    [
        (GOOD, ["all"], ""),
        (GOOD, ["questions", "leaks"], ""),
        (FORGOT, ["leaks"], ""),
        (FORGOT, ["all"], "is not validated: questions failed, 0.2 (0.1 to 0.3), at most 0.1"),
        (LEAKS, ["leaks"], "is not validated: leaks failed, 0.2 (0.1 to 0.3), at most 0.1"),
        (UNSURE, ["all"], "is not validated: questions undecided, 0.2 (0.1 to 0.3), at most 0.1"),
        (GOOD, ["task"], "is not validated: task was not measured"),
        ({"verdict": "not measured"}, ["all"], "is not validated: nothing was measured"),
        (None, ["all"], "has no validation report"),
        (None, [], ""),
    ],
)
def test_a_policy_asks_for_checks_that_have_passed(said, wanted, why):
    read = validation.read(json.dumps(said).encode())
    assert validation.problem(read.kept() if read else {}, wanted) == why


def test_what_is_no_report_is_none():
    for document in (b"", b"[]", b'{"verdict": 3}', b'{"verdict": "passed", "checks": [{"name": "leaks"}]}',
                     b" " * (validation.REPORT_BYTES + 1), b'{"verdict": "passed", "lost": [NaN]}'):  # fmt: skip
        assert validation.read(document) is None


@pytest.mark.parametrize("bad", [FORGOT, LEAKS])
async def test_a_job_whose_adapter_forgot_or_leaks_is_stored_and_one_that_is_good_is_live(training, asking, sdk, bad):
    config = asking("all")
    async with training(config, validation=bad) as client:
        job = await ended(sdk(client), await begun(sdk(client)))
        assert job.status == "succeeded", await messages(sdk(client), job.id)
        shown = (await client.get("/v1/adapters/tone")).json()
        first = shown["versions"][0]
        (held,) = [entry for entry in shown["history"] if entry["what"] == "validation_hold"]
        assert shown["live"] is None and "failed, 0.2" in held["why"]
        assert first["checks"]["validation"]["verdict"] == "failed"
        refused = await client.post("/v1/adapters/tone/promote", json={"version": first["version"]})
        assert refused.status_code == 409 and "is not validated" in refused.json()["error"]["message"]
        over = await client.post("/v1/adapters/tone/promote", json={"version": first["version"], "at_once": True})
        assert over.status_code == 200 and over.json()["live"]


async def test_a_good_report_lets_a_job_go_live(training, asking, sdk):
    async with training(asking("all"), validation=GOOD) as client:
        job = await ended(sdk(client), await begun(sdk(client)))
        shown = (await client.get("/v1/adapters/tone")).json()
        assert job.status == "succeeded" and shown["live"] is not None
        kept = next(each for each in shown["versions"] if each["version"] == shown["live"])["checks"]["validation"]
        assert kept["checks"]["leaks"]["verdict"] == "passed" and kept["lost"] == ["What is 2 + 3? 9, not 5"]


async def test_one_is_validated_at_a_time_and_nobody_hears_whose(training, asking, make_adapter, monkeypatch):
    async with training(asking("questions"), validation=GOOD) as client:
        for seed, name in enumerate(("secret", "tone")):
            await client.post("/v1/adapters", **upload(make_adapter(seed), name=name))
        began, go_on = threading.Event(), threading.Event()

        def waits(*_):
            began.set()
            assert go_on.wait(60)

        monkeypatch.setattr(parts_of(client).validation.process, "validate", waits)
        first = asyncio.create_task(client.post("/v1/adapters/secret/versions/1/validate"))
        await asyncio.to_thread(began.wait, 60)
        second = await client.post("/v1/adapters/tone/versions/1/validate")
        go_on.set()
        await first
        assert second.status_code == 409 and "secret" not in second.text and "one version at a time" in second.text


async def test_a_push_without_a_report_waits_and_is_live_once_it_was_validated(training, asking, sdk, make_adapter):
    async with training(asking("questions", "leaks"), validation=GOOD) as client:
        parts = parts_of(client)
        pushed = await client.post("/v1/adapters", **upload(make_adapter(0)))
        assert pushed.status_code == 201 and pushed.json()["live"] is False
        assert await parts.admission.place("tone") is Place.UNVALIDATED
        version = parts.registry.get("tone", 1)
        for policy in (parts.policies["tone"], parts.policies["tone"].proven):
            with pytest.raises(Conflict, match="has no validation report.*loradock adapters validate tone@v1"):
                await parts.admission.admit(version, policy, "a loop")
        where = "/v1/adapters/tone/versions/1/validate"
        nobodys = await client.post(where, json={"training_file": "file-0"})
        assert nobodys.status_code == 400 and nobodys.json()["error"]["param"] == "training_file"
        said = await client.post(where, json={"training_file": await sent(sdk(client))})
        assert said.status_code == 200, said.text
        assert said.json()["checks"]["validation"]["checks"]["questions"]["verdict"] == "passed"
        history = (await client.get("/v1/adapters/tone")).json()["history"]
        assert [entry["what"] for entry in history] == ["add", "validation_hold", "validated"]
        again = await client.post("/v1/adapters", **upload(make_adapter(0)))
        assert again.status_code == 200 and again.json()["live"] is True, "its report is there by now"
        page = (await client.get("/v1/overview/adapters/tone")).json()
        assert page["versions"][0]["validation"]["verdict"] == "passed"
