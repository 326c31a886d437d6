"""A loop from what opens a try to its end, over the real server, registry, store and jobs."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import replace

import pytest

from serve.config import keys_hashed
from serve.drift.watched_version import iso
from serve.errors import Conflict, EngineUnavailable
from serve.events import CanaryVerdict, DriftAlarm, GoldenScored, JobEnded
from serve.loop.loops import _waits_for
from serve.loop.objects import Loop, Phase, State
from serve.sequential.sequential_test import Verdict
from tests.serve.loop.conftest import LONG, asked, example, loop_of, parts_of, pushed, tried, until
from tests.support.app import issued, upload
from tests.support.backend import FakeBackend
from tests.support.waiting import settled
from tests.support.watched_traffic import Engine, ask, drift


async def live(client, name="tone"):
    return (await client.get(f"/v1/adapters/{name}")).json()["live"]


async def steps_of(client, name="tone"):
    """What the adapter's history says of its loop."""
    history = (await client.get(f"/v1/adapters/{name}")).json()["history"]
    return [change["why"] for change in history if change["what"] == "loop"]


async def test_a_try_trains_proves_and_promotes_the_next_version(looping, make_adapter):
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        attempt = await tried(client)
        assert attempt["outcome"] == "promoted" and attempt["by"] == "loop"
        assert await live(client) == attempt["candidate"] > 1
        (part,) = attempt["gate"]["parts"]
        assert part["part"] == "new" and part["examples"] == 30 and (part["live"], part["candidate"]) == (0.3, 0.9)
        assert part["log_evidence"] > part["log_threshold"] and attempt["gate"]["alpha"] == 0.1
        loop = await loop_of(client)
        assert loop["phase"] == "waiting" and loop["failures"] == 0 and loop["month"]["tries"] == 1
        (reference,) = loop["references"]
        assert reference["examples"] == 30 and reference["label"] == f"v{attempt['candidate']}"
        assert round(reference["score"], 6) == 0.9
        async with asyncio.timeout(LONG):  # the journal is written after the try has its end
            while len(steps := await steps_of(client)) < 4:
                await asyncio.sleep(0.02)
        assert [why.partition(":")[0] for why in steps] == ["opened", "training", "gate", "promoted"]
        job = (await client.get(f"/v1/fine_tuning/jobs/{attempt['job']}")).json()
        assert job["model"] == "tone@v1" and job["metadata"]["try"] == "1"


async def test_every_step_is_in_the_audit_log_and_in_webhooks(looping, make_adapter, config, monkeypatch):
    async with looping() as client:
        parts, heard = parts_of(client), []
        monkeypatch.setattr(parts._webhooks, "send", lambda kind, data: heard.append((kind, data)))
        await pushed(client, make_adapter)
        await asked(client, "run")
        await tried(client)
        # The journal is written after the try has its end.
        assert await settled(lambda: "loop.promoted" in dict(heard), LONG)
        await asyncio.to_thread(parts.events.settle)
        rows = [json.loads(line) for line in parts.audit.path.read_text().splitlines()]
        steps = ["loop_opened", "loop_training", "loop_gate", "loop_promoted"]
        assert [row["what"] for row in rows if row["who"] == "loop"] == steps
        kinds = [kind for kind, _ in heard if kind.startswith("loop.")]
        assert kinds == ["loop.opened", "loop.training", "loop.gate", "loop.promoted"]
        gate = next(data for kind, data in heard if kind == "loop.gate")
        assert gate["adapter"] == "tone" and gate["evidence"]["passed"] is True and gate["try"] == 1
        for _ in range(5000):  # metrics show what the last round has read
            scrape = (await client.get("/metrics")).text
            if 'loradock_loop_state{adapter="tone",phase="waiting"} 1.0' in scrape:
                break
            await asyncio.sleep(0.02)
        assert 'loradock_loop_tries_total{adapter="tone",outcome="promoted"} 1.0' in scrape
        assert 'loradock_loop_state{adapter="tone",phase="waiting"} 1.0' in scrape


async def test_a_candidate_that_is_not_better_changes_nothing_and_the_next_one_waits(looping, make_adapter):
    looping.scores.of = lambda version, word: 0.5
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        first = await tried(client)
        assert first["outcome"] == "rejected" and "not proved to be better on the new traffic" in first["text"]
        waits = (await loop_of(client))["not_before"] - first["ended"]
        await asked(client, "run")
        second = await tried(client, 2)
        loop = await loop_of(client)
        assert loop["failures"] == 2 and loop["references"] == []
        assert loop["not_before"] - second["ended"] > 1.9 * waits > 86_000
        assert await live(client) == 1


async def test_what_was_must_not_be_forgotten(looping, make_adapter):
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        first = await tried(client)
        looping.traffic.word = "other"
        looping.scores.of = lambda version, word: 0.9 if (version == first["candidate"]) == (word == "new") else 0.2
        await asked(client, "run")
        second = await tried(client, 2)
        assert second["outcome"] == "rejected"
        assert f"it is worse on the reference v{first['candidate']}: 0.200 against 0.900" in second["text"]
        assert [part["part"] for part in second["gate"]["parts"]] == ["new", "reference"]
        assert second["gate"]["parts"][0]["passed"] and second["data"]["new"] == 30 == second["data"]["replayed"]
        scrape = (await client.get("/metrics")).text
        assert 'loradock_loop_forgetting_total{adapter="tone"} 1.0' in scrape
        assert any(why.startswith("forgetting: ") for why in await steps_of(client))
        assert await live(client) == first["candidate"]


async def test_a_month_has_so_many_tries_and_no_more(looping, make_adapter):
    looping.scores.of = lambda version, word: 0.5
    async with looping(budget=1) as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        await tried(client)
        await asked(client, "run")
        loop = await until(client, lambda loop: "tries of this month are used" in loop["note"])
        assert loop["phase"] == "waiting" and len(loop["tries"]) == 1
        assert loop["month"] == {"tries": 1, "budget": 1, "spent": 0.2, "alpha": 0.2}


async def test_a_person_says_yes_or_no(looping, make_adapter):
    async with looping(promote="ask") as client:
        await pushed(client, make_adapter)
        assert (await client.post("/v1/adapters/tone/loop/approve")).status_code in (404, 409)
        await asked(client, "run")
        await until(client, lambda loop: loop["phase"] == "asking")
        assert await live(client) == 1
        refused = await client.post("/v1/adapters/tone/loop/run")
        assert refused.status_code == 409 and "is in try 1 already: asking" in refused.json()["error"]["message"]
        await asked(client, "reject", why="the tone is off")
        attempt = await tried(client)
        assert (attempt["outcome"], attempt["text"], attempt["by"]) == ("rejected", "the tone is off", "anonymous")
        await asked(client, "run")
        await until(client, lambda loop: loop["phase"] == "asking")
        await asked(client, "approve")
        attempt = await tried(client, 2)
        assert attempt["outcome"] == "promoted" and attempt["text"] == "anonymous said yes"
        assert await live(client) == attempt["candidate"]


async def test_a_no_stands_when_a_yes_comes_after_it(looping, make_adapter, monkeypatch):
    async with looping(promote="ask") as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        await until(client, lambda loop: loop["phase"] == "asking")
        schedule, end = parts_of(client).loops.schedule, asyncio.Event()
        reject = schedule._driver._reject

        async def slow(*args, **more):
            await end.wait()
            await reject(*args, **more)

        monkeypatch.setattr(schedule._driver, "_reject", slow)
        await asked(client, "reject", why="the tone is off")
        for _ in range(3):
            refused = await client.post("/v1/adapters/tone/loop/approve")
            assert refused.status_code == 409 and "anonymous said no to the candidate of tone" in refused.text
            await asyncio.sleep(0.05)
        end.set()
        assert (await tried(client))["text"] == "the tone is off" and await live(client) == 1


async def test_a_training_that_fails_is_a_sentence(looping, make_adapter):
    async with looping(how={"error": "the loss is not a number"}) as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        attempt = await tried(client)
        assert attempt["outcome"] == "failed" and "is failed: " in attempt["text"]
        assert "the loss is not a number" in attempt["text"] and await live(client) == 1


async def test_an_engine_that_does_not_answer_says_nothing_about_the_candidate(looping, make_adapter, monkeypatch):
    answers, fails = looping.scores.scores, [EngineUnavailable("the engine starts")] * 2

    async def scores(version, examples):
        if fails:
            raise fails.pop()
        return await answers(version, examples)

    monkeypatch.setattr(looping.scores, "scores", scores)
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        assert (await tried(client))["outcome"] == "promoted" and not fails


async def test_traffic_that_may_not_be_learned_from_is_a_sentence(looping, make_adapter, monkeypatch):
    async def refusing(name, **_):
        raise Conflict("tone does not learn from its traffic")

    monkeypatch.setattr(looping, "traffic", refusing)
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        attempt = await tried(client)
        assert (attempt["outcome"], attempt["text"]) == ("failed", "tone does not learn from its traffic")
        assert await live(client) == 1 and (await client.get("/v1/fine_tuning/jobs")).json()["data"] == []


async def test_a_set_of_golden_cases_is_a_part_of_the_gate(looping, make_adapter, backend):
    backend.say = lambda body: "yes" if "tone@" in body["model"] and not body["model"].startswith(old) else "no"
    old = "nobody"
    async with looping() as client:
        await pushed(client, make_adapter)
        old = (await client.get("/v1/adapters/tone")).json()["versions"][0]["id"]
        cases = [{"prompt": f"case {number}", "equals": "no"} for number in range(30)]
        assert (await client.put("/v1/adapters/tone/golden", json={"cases": cases})).status_code == 200
        await asked(client, "run")
        attempt = await tried(client)
        assert (
            attempt["outcome"] == "rejected" and "it is worse on the golden set: 0.000 against 1.000" in attempt["text"]
        )
        assert [part["part"] for part in attempt["gate"]["parts"]] == ["new", "golden"]


async def test_too_few_examples_are_waited_for(looping, make_adapter):
    looping.traffic.count = 30
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: "30 of 40 examples" in loop["note"])
        assert loop["phase"] == "gathering"
        looping.traffic.count = 60
        assert (await tried(client))["outcome"] == "promoted"


async def test_a_try_that_never_has_enough_examples_was_none(looping, make_adapter, monkeypatch):
    monkeypatch.setattr("serve.loop.driver.GATHER_MOST", 0.0)
    looping.traffic.count = 30
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: "it has waited for 30 days" in loop["note"])
        assert loop["phase"] == "waiting" and loop["tries"] == [] and loop["month"]["spent"] == 0
        async with asyncio.timeout(LONG):
            while not (await steps_of(client))[-1].startswith("given_up: 30 of 40 examples"):
                await asyncio.sleep(0.02)


def verdict(loop, kind, reason="proved"):
    attempt = loop["tries"][0]
    return CanaryVerdict("tone", attempt["live"], attempt["candidate"], kind, reason, {})


async def test_a_canary_that_proves_itself_is_promoted(looping, make_adapter):
    async with looping(canary=0.25) as client:
        parts = parts_of(client)
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: loop["phase"] == "canary" and "traffic" in loop["note"])
        attempt = loop["tries"][0]
        canary = (await client.get("/v1/adapters/tone")).json()["canary"]
        assert canary == {"version": attempt["candidate"], "weight": 0.25} and await live(client) == 1
        # Its verdict may cost what the try may spend, and no more.
        assert await asyncio.to_thread(parts.tries.alpha, "tone") == 0.1
        parts.events.publish(verdict(loop, Verdict.PROVED))
        assert (await tried(client))["outcome"] == "promoted"
        assert await live(client) == attempt["candidate"]
        assert await asyncio.to_thread(parts.tries.alpha, "tone") == 1.0


# Neither verdict comes from noise.
SURE = {"canary": 0.5, "min_examples": 60, "gate": {"tolerance": 0.3, "alpha": 0.001, "golden": 0.3}, "budget": 1}


async def in_canary(client, make_adapter):
    """The loop of `tone`, and the id of its candidate, which gets its share of the traffic."""
    await pushed(client, make_adapter)
    await asked(client, "run")
    loop = await until(client, lambda loop: loop["phase"] == "canary" and "traffic" in loop["note"])
    candidate = loop["tries"][0]["candidate"]
    return loop, parts_of(client).registry.get("tone", candidate).id


async def test_a_candidate_may_answer_otherwise_than_the_version_that_was_not_made_for_the_new_traffic(
    looping, make_adapter, watched, backend
):
    engine = Engine(backend)
    async with looping(watched, backend=backend, **SURE) as client:
        loop, candidate = await in_canary(client, make_adapter)
        engine.sure.add(candidate)
        await ask(client, 300)
        report = (await drift(client))["canary"]
        assert report["verdict"] != "worse" and report["requests"] == 300, report
        assert not {"length", "mean_logprob"} & {check["check"] for check in report["checks"]}
        parts_of(client).events.publish(verdict(loop, Verdict.PROVED))
        assert (await tried(client))["outcome"] == "promoted"


async def test_a_candidate_whose_answers_are_cut_off_is_rejected(looping, make_adapter, watched, backend):
    engine = Engine(backend)
    async with looping(watched, backend=backend, **SURE) as client:
        _, candidate = await in_canary(client, make_adapter)
        engine.odd.add(candidate)
        await ask(client, 300)
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and attempt["canary"]["reason"] == "quality", attempt
        assert await live(client) == 1


async def test_a_canary_that_does_worse_is_rejected_and_ended(looping, make_adapter):
    async with looping(canary=0.25) as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: loop["phase"] == "canary" and "traffic" in loop["note"])
        parts_of(client).events.publish(verdict(loop, Verdict.WORSE, "errors"))
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and "canary" in attempt["text"]
        adapter = (await client.get("/v1/adapters/tone")).json()
        assert adapter["live"] == 1 and adapter["canary"] is None


@pytest.mark.parametrize(("kind", "outcome"), [(Verdict.WORSE, "rejected"), (Verdict.PROVED, "promoted")])
async def test_no_verdict_is_lost_while_the_loop_cannot_be_read(looping, make_adapter, monkeypatch, kind, outcome):
    monkeypatch.setattr("serve.rollout.controller.RETRY_SECONDS", 0.01)
    async with looping(canary=0.25) as client:
        tries = parts_of(client).tries
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: loop["phase"] == "canary" and "traffic" in loop["note"])
        hears, fails = tries.heard, [EngineUnavailable("the database is away")]

        def heard(verdict):
            if fails:
                raise fails.pop()
            return hears(verdict)

        monkeypatch.setattr(tries, "heard", heard)
        parts_of(client).events.publish(verdict(loop, kind, "errors"))
        attempt = await tried(client)
        assert attempt["outcome"] == outcome and "canary" in attempt["text"] and not fails


async def test_a_yes_to_a_canary_that_did_worse_promotes_nothing(looping, make_adapter, monkeypatch):
    async with looping(canary=0.25, promote="ask") as client:
        parts = parts_of(client)
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: loop["phase"] == "canary" and "traffic" in loop["note"])
        monkeypatch.setattr("serve.loop.driver.RETRY_SECONDS", 3600.0)
        parts.events.publish(verdict(loop, Verdict.PROVED))
        await until(client, lambda loop: "loradock loop approve tone" in loop["note"])
        rows = parts.loops.rows
        said = {"verdict": Verdict.WORSE.value, "reason": "errors"}
        await asyncio.to_thread(lambda: rows.hear(rows.get("tone"), said))
        await asked(client, "approve")
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and "did worse while it waited for a yes: errors" in attempt["text"]
        assert await live(client) == 1


@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_stop_in_the_last_step_is_obeyed(looping, make_adapter, monkeypatch, everywhere):
    async with looping() as client:
        parts = parts_of(client)
        await pushed(client, make_adapter)
        check, loops = parts.golden.verdicts.check, parts.loops

        async def stopped_meanwhile(*asked):
            await asyncio.to_thread(loops.stop, None if everywhere else "tone", "anna")
            await check(*asked)

        monkeypatch.setattr(parts.golden.verdicts, "check", stopped_meanwhile)
        await asked(client, "run")
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and attempt["text"] == "stopped by anna" and await live(client) == 1


async def test_a_candidate_that_a_person_tries_first_may_cost_no_more_than_its_loop_says(looping, make_adapter):
    looping.scores.hold.clear()
    async with looping(canary=0.25) as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        await until(client, lambda loop: loop["phase"] == "gate")
        assert await asyncio.to_thread(parts_of(client).tries.alpha, "tone") == 0.1
        looping.scores.hold.set()


async def test_a_canary_waits_for_another_one_and_its_end_by_hand_is_a_no(looping, make_adapter):
    looping.scores.hold.clear()
    async with looping(canary=0.25) as client:
        await pushed(client, make_adapter)
        await client.post("/v1/adapters", **upload(make_adapter(9), promote="false"))
        await asked(client, "run")
        await until(client, lambda loop: loop["phase"] == "gate")
        place = "/v1/adapters/tone/canary"
        (await client.post(place, json={"version": 2, "weight": 0.5})).raise_for_status()
        looping.scores.hold.set()
        await until(client, lambda loop: "v2 is the canary: this one waits for its end" in loop["note"])
        (await client.post(place, json={"version": 2, "weight": 0})).raise_for_status()
        loop = await until(client, lambda loop: "gets 0.25 of the traffic" in loop["note"] or "answers" in loop["note"])
        candidate = loop["tries"][0]["candidate"]
        (await client.post(place, json={"version": candidate, "weight": 0})).raise_for_status()
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and attempt["text"].startswith("its canary was ended: anonymous")
        assert await live(client) == 1


async def test_a_canary_that_a_person_began_and_ended_is_not_begun_again(looping, make_adapter):
    """Nor one that a server began which died before it wrote that down."""
    looping.scores.hold.clear()
    async with looping(canary=0.25) as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: loop["phase"] == "gate")
        candidate, place = loop["tries"][0]["candidate"], "/v1/adapters/tone/canary"
        for weight in (0.1, 0):
            (await client.post(place, json={"version": candidate, "weight": weight})).raise_for_status()
        looping.scores.hold.set()
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and attempt["text"].startswith("its canary was ended: anonymous")
        history = parts_of(client).registry.history("tone")
        assert [change["weight"] for change in history if change["what"] == "canary"] == [0.1]


async def test_a_version_that_went_live_meanwhile_ends_the_try(looping, make_adapter):
    looping.scores.hold.clear()
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        await until(client, lambda loop: loop["phase"] == "gate")
        await client.post("/v1/adapters", **upload(make_adapter(9)))
        looping.scores.hold.set()
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected"
        assert attempt["text"] == f"v{await live(client)} went live meanwhile, and the try began with v1"
        assert await live(client) not in (1, attempt["candidate"])


async def test_a_loop_that_was_stopped_does_nothing(looping, make_adapter):
    async with looping(how={"seconds": 5.0}) as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        loop = await until(client, lambda loop: loop["phase"] == "training")
        job = loop["tries"][0]["job"]
        stopped = await asked(client, "stop")
        assert stopped["stopped"] == "anonymous"
        attempt = await tried(client)
        assert attempt["outcome"] == "rejected" and attempt["text"] == "stopped by anonymous"
        assert (await client.get(f"/v1/fine_tuning/jobs/{job}")).json()["status"] == "cancelled"
        refused = await client.post("/v1/adapters/tone/loop/run")
        assert refused.status_code == 409 and "was stopped by anonymous: start it first" in refused.text
        await asked(client, "start")
        await asked(client, "run")


async def test_an_operator_stops_every_loop(looping, make_adapter):
    async with looping() as client:
        await pushed(client, make_adapter)
        assert (await client.post("/v1/loops/stop")).json() == {"object": "loops", "stopped": "anonymous"}
        assert (await client.post("/v1/adapters/tone/loop/run")).status_code == 409
        assert (await loop_of(client))["stopped_everywhere"] == "anonymous"
        await client.post("/v1/loops/start")
        await asked(client, "run")
        assert (await tried(client))["outcome"] == "promoted"
        (row,) = (await client.get("/v1/loops")).json()["data"]
        assert row["name"] == "tone" and row["phase"] == "waiting"


async def test_a_server_that_starts_again_goes_on_where_the_loop_is(looping, make_adapter):
    looping.scores.hold.clear()
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        first = (await until(client, lambda loop: loop["phase"] == "gate"))["tries"][0]
    looping.scores.hold.set()
    async with looping(backend=FakeBackend()) as client:
        attempt = await tried(client)
        assert attempt["outcome"] == "promoted" and attempt["candidate"] == first["candidate"]
        assert attempt["job"] == first["job"]


async def test_a_clients_job_that_claims_to_be_a_loops_is_not_taken_for_it(looping, make_adapter):
    async with looping() as client:
        await pushed(client, make_adapter)
        parts = parts_of(client)
        loop = await asyncio.to_thread(parts.loops.rows.made, "tone")
        lines = "".join(json.dumps(example("poison", number)) + "\n" for number in range(20))
        file = await client.post("/v1/files", files={"file": ("poison.jsonl", lines)}, data={"purpose": "fine-tune"})
        marks = {"loop": loop.id, "try": "1"}
        body = {"model": "tone", "training_file": file.json()["id"], "metadata": marks}
        theirs = await client.post("/v1/fine_tuning/jobs", json=body)
        assert theirs.status_code == 200, theirs.text
        await asked(client, "run")
        ended = await tried(client)
        assert ended["job"] != theirs.json()["id"]
        own = (await client.get(f"/v1/fine_tuning/jobs/{ended['job']}")).json()
        assert own["training_file"] != file.json()["id"] and own["metadata"] == marks


async def test_a_schedule_opens_a_try_by_itself(looping, make_adapter):
    async with looping(every="1s", wait="1s") as client:
        await pushed(client, make_adapter)
        attempt = await tried(client)
        assert attempt["cause"]["kind"] == "schedule" and attempt["outcome"] == "promoted"


async def test_drift_opens_a_try_over_the_traffic_since_it_began(looping, make_adapter, watched, backend):
    engine = Engine(backend)
    async with looping(watched, backend=backend, on=["drift"]) as client:
        await pushed(client, make_adapter)
        await ask(client, 270)
        engine.topic = range(14, 30)
        await ask(client, 150)
        attempt = await tried(client)
        signals, _, moved = attempt["cause"]["text"].partition(" drifted: ")
        assert attempt["cause"]["kind"] == "drift" and "prompt" in signals and moved, attempt
        assert attempt["outcome"] == "promoted" and await live(client) == attempt["candidate"], attempt
        # What an alarm does not say the beginning of is gathered whole.
        since = looping.traffic.asked[0][0]
        assert since == 0.0 or iso(since) in moved, (since, attempt)
        # What is asked now is what the version was made for: it opens no other try.
        await ask(client, 200)
        await asyncio.to_thread(parts_of(client).exchange_worker.settle)
        (row,) = (await client.get("/v1/drift")).json()["data"]
        drifted = {version["version"]: version["drifted"] for version in row["versions"]}
        assert drifted[f"v{attempt['candidate']}"] == [] and len((await loop_of(client))["tries"]) == 1, row


async def test_captured_answers_and_their_corrections_are_what_a_candidate_learns(looping, make_adapter, backend):
    Engine(backend)
    looping.traffic, lots = None, random.Random(1)
    looping.scores.of = lambda version, word: 0.3 if version == 1 else 0.9
    backend.say = lambda body: "I cannot help with that." if body["model"].endswith(first) else "yes"
    async with looping() as client:
        await pushed(client, make_adapter)
        first = parts_of(client).registry.live("tone").digest[:12]
        for number in range(60):
            said = " ".join("".join(lots.choices("abcdefghijklmnop", k=6)) for _ in range(8))
            body = {"model": "tone", "messages": [{"role": "user", "content": said}], "user": f"u{number}"}
            answer = await client.post("/v1/chat/completions", json=body)
            told = {"request_id": answer.headers["x-request-id"], "answer": f"the answer to {said}"}
            assert (await client.post("/v1/feedback", json=told)).status_code == 200
        await asyncio.to_thread(parts_of(client).captures.worker.settle)
        await asked(client, "run")
        attempt = await tried(client)
        assert attempt["outcome"] == "promoted" and attempt["data"]["captured"] == 60
        assert attempt["data"]["sources"]["train"]["corrected"] == attempt["data"]["new"]
        # Both versions answer what was held out, and nobody sees it; what was trained on would flatter the candidate.
        told = attempt["replay"]
        assert told["requests"] == 20 <= attempt["data"]["held_out"] and told["agreement"]["exact"] == 0.0
        assert told["refusals"] == {"other": 1.0, "candidate": 0.0} and told["ratings"]["rated"] == 20
        assert "20 held-out requests: 0%" in told["text"] and "0% are refusals, and 100%" in told["text"]
        assert any(why.startswith("replay: 20 held-out") for why in await steps_of(client))
        (reference,) = (await loop_of(client))["references"]
        rows = parts_of(client).loops.rows
        (first, *_) = await asyncio.to_thread(rows.references.examples, reference["id"])
        assert first.fields["messages"][-1]["content"].startswith("the answer to ")
        # The conversation went on with another adapter, whose loop held that out.
        await pushed(client, make_adapter, "other")
        other = await asyncio.to_thread(rows.made, "other")
        copy = await asyncio.to_thread(rows.references.hold_out, other, [first], label="v1")
        # A first reference is made of a training file, which says of no line what conversation it is from.
        line = replace(first, conversation="")
        unmarked = await asyncio.to_thread(rows.references.hold_out, other, [line], label="training of v1")
        place = f"/v1/adapters/tone/data/conversations/{first.conversation}"
        assert (await client.delete(place)).json()["deleted"]
        assert await asyncio.to_thread(rows.references.examples, copy) == []
        assert await asyncio.to_thread(rows.references.examples, unmarked) == []
        (fewer,) = (await loop_of(client))["references"]
        assert fewer["examples"] == reference["examples"] - 1 and (await client.delete(place)).status_code == 404


async def test_an_adapter_that_does_not_learn_from_its_traffic_spends_no_try(connect, config, make_adapter):
    async with connect(config) as client:
        await pushed(client, make_adapter)
        answer = await client.post("/v1/adapters/tone/loop/run")
        assert answer.status_code == 409 and "train_on_traffic: true" in answer.json()["error"]["message"]
        assert (await loop_of(client))["tries"] == []


async def test_an_adapter_that_is_gone_has_no_loop(looping, make_adapter):
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        await tried(client)
        await client.delete("/v1/adapters/tone")
        rows = parts_of(client).loops.rows
        async with asyncio.timeout(LONG):
            while left := await asyncio.to_thread(rows.all):
                await asyncio.sleep(0.02)
        assert left == [] and (await client.get("/v1/loops")).json()["data"] == []


async def test_a_reference_is_forgotten_on_demand(looping, make_adapter):
    async with looping() as client:
        await pushed(client, make_adapter)
        await asked(client, "run")
        await tried(client)
        (reference,) = (await loop_of(client))["references"]
        place = f"/v1/adapters/tone/loop/references/{reference['id']}"
        assert (await client.delete(place)).json()["references"] == []
        assert (await client.delete(place)).status_code == 404


ROUTES = [
    ("GET", "loop"), ("POST", "loop/run"), ("POST", "loop/approve"), ("POST", "loop/reject"), ("POST", "loop/stop"),
    ("POST", "loop/start"), ("DELETE", "loop/references/ref-1"),
]  # fmt: skip


async def test_a_loop_is_its_tenants_alone(looping, make_adapter, config):
    async with looping(replace(config, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme, other = await issued(operator, "acme"), await issued(operator, "other")
        reader = await issued(operator, "acme", "inference")
        await pushed(acme, make_adapter)
        for method, route in ROUTES:
            for name in ("tone", "acme/tone"):
                answer = await other.request(method, f"/v1/adapters/{name}/{route}")
                assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found", route
            assert (await reader.request(method, f"/v1/adapters/tone/{route}")).status_code == 403
        for verb in ("stop", "start"):
            assert (await acme.post(f"/v1/loops/{verb}")).status_code == 403
        await asked(acme, "run")
        attempt = await tried(acme)
        assert attempt["outcome"] == "promoted"
        assert (await other.get("/v1/loops")).json()["data"] == []
        assert (await acme.get(f"/v1/fine_tuning/jobs/{attempt['job']}")).status_code == 200
        assert (await other.get(f"/v1/fine_tuning/jobs/{attempt['job']}")).status_code == 404


async def test_a_drift_alarm_is_no_news_that_a_loop_has_to_look_for(looping, make_adapter, monkeypatch):
    async with looping(on=["drift"], promote="ask") as client:
        parts, looked = parts_of(client), []
        # From here on nothing is looked at by itself.
        monkeypatch.setattr("serve.jobs.schedule.LOOK_SECONDS", 3600.0)
        await pushed(client, make_adapter)
        await asyncio.to_thread(parts.loops.rows.made, "tone")
        causes = parts.loops.driver.causes
        await asyncio.to_thread(causes.look_if_new, time.time())  # as the first round does
        row = {"version": "v1", "drifted": ["prompt"], "moved": {}, "since": {}}

        def summary():
            looked.append(1)
            return {"tone": [row]}

        monkeypatch.setattr(parts.drift_monitor, "summary", summary)
        parts.loops.schedule.wake()
        await asyncio.to_thread(causes.look_if_new, time.time())
        assert (await loop_of(client))["phase"] == "waiting" and not looked, "without an alarm nobody asks the watcher"
        parts.events.publish(DriftAlarm("tone", "v1", "prompt", {}, 12.0))
        loop = await until(client, lambda loop: loop["tries"])
        assert loop["tries"][0]["cause"]["kind"] == "drift" and looked


def test_a_loop_looks_when_what_it_waits_for_has_ended():
    training = Loop("loop-1", "acme/tone", Phase.TRAINING, State(job="ftjob-1"))
    gate = Loop("loop-1", "acme/tone", Phase.GATE, State(job="ftjob-1"))
    ended, scored = JobEnded("ftjob-1", "acme", "failed"), GoldenScored("acme/tone", 2, 0.5, 8, True)
    assert _waits_for(training, ended) and not _waits_for(training, scored)
    assert _waits_for(gate, scored) and not _waits_for(gate, ended)
    assert not _waits_for(training, JobEnded("ftjob-2", "acme", "failed"))
    assert not _waits_for(gate, GoldenScored("tone", 2, 0.5, 8, True))


async def test_what_people_say_of_a_loop_they_say_to_any_server(looping, make_adapter, config, tiny_model, tmp_path):
    """One of two servers drives a try: the other one opens it, says yes, and sees it end."""
    both = replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=f"file://{tmp_path}/shared")
    servers = [
        looping(
            replace(both, data_dir=tmp_path / f"data-{number}"), backend=FakeBackend(str(tiny_model)), promote="ask"
        )
        for number in range(2)
    ]
    async with servers[0] as one, servers[1] as other:
        await pushed(one, make_adapter)
        # The other one drives.
        parts_of(one).loops.schedule._claim = nothing
        await asked(one, "run")
        assert (await until(one, lambda loop: loop["phase"] == "asking"))["tries"][0]["candidate"] == 2
        await asked(one, "approve")
        for client in (one, other):
            assert (await tried(client))["outcome"] == "promoted" and await live(client) == 2


async def nothing(_):
    """No loop is this server's to drive."""
