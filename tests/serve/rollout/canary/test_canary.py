"""A canary is compared with the live version, and ended or promoted by policy."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from serve.adapters.registry.snapshot import Share
from serve.asgi.exchange import Exchange, Generation
from serve.config import keys_hashed
from serve.errors import LoradockError
from serve.events import Events
from serve.rollout import controller
from serve.rollout.canary.canary import CanaryAnalysis
from serve.rollout.canary.canary_monitor import FILE, CanaryMonitor
from serve.rollout.policy import DEFAULT_POLICIES, Policies, parse
from tests.support.app import issued, upload
from tests.support.waiting import settled
from tests.support.watched_traffic import CHAT, Engine, ask, askers, canary_ended, drift, push


async def test_a_canary_that_is_slower_is_ended_with_the_evidence_in_history_audit_and_metrics(
    connect, watched, backend, make_adapter
):
    engine = Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.slow[canary] = 1.25
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.25})
        for _ in range(20):
            await ask(client, 50)
            await drift(client)
            if await canary_ended(client):
                break
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["canary"] is None and shown["live"] == 1
        entry = shown["history"][-1]
        assert entry["who"] == "wayback" and "inter_token" in entry["why"]
        counted = 'loradock_rollbacks_total{adapter="tone",reason="latency",version="v2"} 1.0'

        async def told():
            return counted in (await client.get("/metrics")).text

        assert await settled(told)
        log = watched.data_dir / "audit.jsonl"

        async def audited():
            last = json.loads(log.read_text().splitlines()[-1])
            return last["what"] == "canary_ended" and "inter_token" in last["evidence"]

        assert await settled(audited)


async def test_a_damaged_canary_is_ended_within_sixty_of_its_requests(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.odd.add(canary)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.1})
        for _ in range(100):
            await ask(client, 20)
            await drift(client)
            if await canary_ended(client):
                break
        used = sum(body["model"] == canary for body in backend.bodies)
        assert used <= 60 and (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def test_by_policy_a_promote_begins_as_a_canary_and_ends_when_it_has_proved_itself(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], canary_weight=0.5, proved="promote", alpha=0.05)
    async with connect(replace(watched, policies=(policy,))) as client:
        await client.post("/v1/adapters", **upload(make_adapter(0)))
        await client.post("/v1/adapters", **upload(make_adapter(1)))
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (1, {"version": 2, "weight": 0.5})
        for _ in range(40):
            await ask(client, 50)
            await drift(client)
            if (await client.get("/v1/adapters/tone")).json()["live"] == 2:
                break
        shown = (await client.get("/v1/adapters/tone")).json()
        assert (shown["live"], shown["canary"]) == (2, None)
        assert shown["history"][-1]["who"] == "referee" or shown["history"][-2]["who"] == "referee"


async def test_by_policy_a_canary_that_did_worse_is_held_back_until_somebody_insists(
    connect, watched, backend, make_adapter
):
    engine = Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], worse="hold")
    async with connect(replace(watched, policies=(policy,))) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        engine.odd.add(canary)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        await ask(client, 200)
        assert (await drift(client))["canary"]["verdict"] == "worse"
        shown = (await client.get("/v1/adapters/tone")).json()
        assert shown["canary"] == {"version": 2, "weight": 0.5}, "to hold is not to end"
        held = await client.post("/v1/adapters/tone/promote", json={"version": 2})
        assert held.status_code == 409 and "did worse" in held.json()["error"]["message"]
        insisted = await client.post("/v1/adapters/tone/promote", json={"version": 2, "at_once": True})
        assert insisted.status_code == 200 and insisted.json()["live"]


async def test_bad_ratings_alone_end_a_canary(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(watched) as client:
        _, canary = await push(client, make_adapter, 0, 1)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        for _ in range(300):
            answer = await client.post(CHAT, json={"model": "tone", "user": f"u{next(askers)}"})
            rating = 0.1 if answer.json()["model"] == canary else 0.9
            body = {"request_id": answer.headers["x-request-id"], "rating": rating}
            assert (await client.post("/v1/feedback", json=body)).status_code == 200
        await drift(client)
        assert await settled(lambda: canary_ended(client))
        assert "rating" in (await client.get("/v1/adapters/tone")).json()["history"][-1]["why"]


async def rated(client, key, count, canary, rate=lambda is_canary: 0.0 if is_canary else 1.0):
    """So many requests of as many users that are rated, all with one key."""
    for _ in range(count):
        answer = await key.post(CHAT, json={"model": "default/tone", "user": f"u{next(askers)}"})
        assert answer.status_code == 200, answer.text
        body = {"request_id": answer.headers["x-request-id"], "rating": rate(answer.json()["model"] == canary)}
        assert (await key.post("/v1/feedback", json=body)).status_code == 200
    return (await drift(client))["canary"]


@pytest.mark.parametrize("named", [False, True])
async def test_a_stranger_who_may_ask_a_shared_adapter_ends_no_canary_of_it(
    connect, watched, backend, make_adapter, named
):
    Engine(backend)
    says = {"tenants": ["acme"], "ratings_per_key": 1000} if named else {}
    policies = parse({"*": {"worse": "hold", "verdicts": says}})
    config = replace(watched, admin_keys=keys_hashed(["run"]), policies=policies)
    async with connect(config) as client:
        client.headers["authorization"] = "Bearer run"
        _, canary = await push(client, make_adapter, 0, 1)
        assert (await client.post("/v1/adapters/tone/visibility", json={"visibility": "shared"})).status_code == 200
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        stranger = await issued(client, "acme", "inference")
        report = await rated(client, stranger, 150, canary)
        ratings = next(check for check in report["checks"] if check["check"] == "rating")
        if named:
            assert report["verdict"] == "worse" and ratings["worse"]
        else:
            assert report["verdict"] == "undecided" and ratings["canary_requests"] == 0
            assert report["requests_left_out"] == 130, "nor does its traffic, beyond a few requests"


async def test_one_key_of_its_own_tenant_has_a_bounded_weight_in_a_verdict(connect, watched, backend, make_adapter):
    Engine(backend)
    config = replace(watched, admin_keys=keys_hashed(["run"]), policies=parse({"*": {"worse": "hold"}}))
    async with connect(config) as client:
        client.headers["authorization"] = "Bearer run"
        _, canary = await push(client, make_adapter, 0, 1)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        report = await rated(client, client, 150, canary)
        ratings = next(check for check in report["checks"] if check["check"] == "rating")
        assert (report["verdict"], ratings["canary_requests"] + ratings["live_requests"]) == ("undecided", 20)
        assert (report["ratings_left_out"], report["requests_left_out"]) == (130, 0)
        others = [await issued(client, "default", "inference", name=f"key-{number}") for number in range(10)]
        for other in others:
            report = await rated(client, other, 20, canary)
        assert report["verdict"] == "worse", "ten keys are more than one"


async def bad_canary(client, make_adapter, engine):
    """Version 2 is a canary that does worse, and enough traffic has shown it."""
    _, canary = await push(client, make_adapter, 0, 1)
    engine.odd.add(canary)
    await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
    await ask(client, 150)
    assert (await drift(client))["canary"]["verdict"] == "worse"


def damaged_database(client, monkeypatch):
    """Every change of a traffic split fails, and not because the database is away, until the list here is emptied."""
    registry = client._transport.app.state.parts.registry
    share, locked = registry.share, ["damaged"]

    def fail(*args, **options):
        if locked and args[3] == 0:
            locked.append("again")
            raise LoradockError("the registry is damaged")
        return share(*args, **options)

    monkeypatch.setattr(registry, "share", fail)
    return locked


async def test_a_rollback_that_failed_is_tried_again_until_it_is_done(
    connect, watched, backend, make_adapter, monkeypatch
):
    monkeypatch.setattr(controller, "RETRY_SECONDS", 0.01)
    engine = Engine(backend)
    async with connect(watched) as client:
        locked = damaged_database(client, monkeypatch)
        await bad_canary(client, make_adapter, engine)
        assert await settled(lambda: asyncio.sleep(0, len(locked) > 3)), "it is tried again and again"
        assert not await canary_ended(client)
        assert 'loradock_canary_verdicts_pending{verdict="worse"} 1.0' in (await client.get("/metrics")).text
        locked.clear()
        assert await settled(lambda: canary_ended(client))

        rollouts = client._transport.app.state.parts.rollout_controller

        async def none_pending():
            (pending,) = rollouts.collect()
            return {sample.value for sample in pending.samples} == {0}

        assert await settled(none_pending)
        await asyncio.to_thread(client._transport.app.state.parts.events.settle)
        lines = [json.loads(line) for line in (watched.data_dir / "audit.jsonl").read_text().splitlines()]
        outcomes = [line["what"] for line in lines if line["who"] == "wayback"]
        assert outcomes == ["failed", "canary_ended"], "each attempt in the log, the first failure in the audit log"


async def test_a_rollback_that_failed_is_tried_again_after_a_restart_without_any_traffic(
    connect, watched, backend, make_adapter, monkeypatch
):
    engine = Engine(backend)
    async with connect(watched) as client:
        locked = damaged_database(client, monkeypatch)
        await bad_canary(client, make_adapter, engine)
        assert await settled(lambda: asyncio.sleep(0, len(locked) > 1))
    backend.held.clear()
    backend.numbers.clear()
    async with connect(watched) as client:
        assert await settled(lambda: canary_ended(client))
        # Whoever makes it a canary again begins again.
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        assert (await drift(client))["canary"] is None
    backend.held.clear()
    backend.numbers.clear()
    async with connect(watched) as client:
        await ask(client, 1)
        assert (await drift(client))["canary"]["verdict"] == "undecided"
        assert not await canary_ended(client)


async def test_a_rollback_is_not_tried_again_once_somebody_has_promoted_the_canary(
    connect, watched, backend, make_adapter, monkeypatch
):
    monkeypatch.setattr(controller, "RETRY_SECONDS", 0.2)
    engine = Engine(backend)
    async with connect(watched) as client:
        locked = damaged_database(client, monkeypatch)
        await bad_canary(client, make_adapter, engine)
        assert await settled(lambda: asyncio.sleep(0, len(locked) > 1))
        promoted = await client.post("/v1/adapters/tone/promote", json={"version": 2, "at_once": True})
        assert promoted.status_code == 200
        locked.clear()
        actions = client._transport.app.state.parts.rollout_controller._actions
        assert await settled(lambda: asyncio.sleep(0, not actions))
        assert (await client.get("/v1/adapters/tone")).json()["live"] == 2


async def test_a_verdict_that_people_are_told_of_is_told_once(connect, watched, backend, make_adapter):
    engine = Engine(backend)
    config = replace(watched, policies=(replace(DEFAULT_POLICIES[0], worse="notify"),))
    for _ in range(2):
        async with connect(config) as client:
            if not (config.data_dir / "drift/trials.npz").exists():
                await bad_canary(client, make_adapter, engine)
        backend.held.clear()
        backend.numbers.clear()
    lines = [json.loads(line) for line in (config.data_dir / "audit.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines if line["who"] == "referee"] == ["canary_worse"]


# What is compared

SHARE = Share(SimpleNamespace(version=2), 0.5)
TRIALS_OF_A74E6CF = Path(__file__).parents[3] / "fixtures" / "trials-a74e6cf.npz"


class Registered:
    """A registry where every adapter has version 1 live and version 2 as its canary."""

    def __contains__(self, name):
        return True

    def canary(self, name):
        return SHARE

    def live(self, name):
        return SimpleNamespace(version=1)


def analysing(folder, candidate=None):
    tries = SimpleNamespace(
        alpha=lambda name: 1.0, begin=lambda *what: 1.0, is_candidate=lambda name, version: version == candidate
    )
    return CanaryMonitor(folder, Registered(), Policies(), SimpleNamespace(alpha=lambda name: 0.01), tries, Events())


def exchange(canary, asker, prefill, waited=0.0, status=200, draw=None):
    made = Generation([1] * 8, [1, 2], "stop", gap=0.02)
    generations = (made,) if status == 200 else ()
    version = "v2" if canary else "v1"
    return Exchange(
        "tone", version, status, waited + prefill, 9.0, asker=asker, generations=generations, dealt=True,
        seated=waited, draw=draw,
    )  # fmt: skip


def checks(analysis):
    return {check["check"]: check for check in analysis.report()["checks"]}


def test_the_wait_for_a_seat_and_the_loading_of_an_adapter_are_not_the_versions_latency():
    analysis, rng = CanaryAnalysis("tone", 1, SHARE, 0.01, 0), np.random.default_rng(0)
    for number in range(1000):
        canary = bool(rng.random() < 0.5)
        took = 0.05 * rng.lognormal(0, 0.2) * (3 if canary else 1)
        analysis.observe(exchange(canary, f"{number}".encode(), took, waited=0.0 if canary else 5.0))
    first = checks(analysis)["first_token"]
    assert 2.7 < first["effect"] < 3.3 and first["worse"] and not first["proved"]


def test_a_request_that_came_to_nothing_does_not_use_up_its_asker():
    analysis = CanaryAnalysis("tone", 1, SHARE, 0.01, 0)
    for status in (400, 200, 200):
        analysis.observe(exchange(True, b"ana", 0.1, status=status))
    report = analysis.report()
    assert (report["requests"], report["skipped"], report["askers"]) == (2, 1, 1)


def test_a_key_that_likes_nothing_counts_as_often_for_both_versions():
    """Of a canary of a tenth: were it ten ratings of each version, its own would be half of the canary's ratings."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        analysis = CanaryAnalysis("tone", 1, Share(SimpleNamespace(version=2), 0.1), 0.01, seed)
        for number in range(600):
            canary = bool(rng.random() < 0.1)
            analysis.observe(exchange(canary, b"%d" % number, 0.05))
            key, limit = (f"k{number}", 20) if number % 2 else ("never content", 20)
            analysis.rate("v2" if canary else "v1", float(number % 2), b"%d" % number, key, limit)
        rating = checks(analysis)["rating"]
        assert not rating["worse"] and abs(rating["effect"]) < 0.3, rating
        assert analysis.report()["ratings_left_out"] == 280


def test_ratings_by_key_that_an_earlier_release_saved_by_version_count_together():
    analysis = CanaryAnalysis("tone", 1, SHARE, 0.01, 0)
    analysis.rate("v2", 1.0, b"ana", "acme", 20)
    saved = analysis.state()
    ((key, _, _),) = saved["key_ratings"].tolist()
    again = CanaryAnalysis.from_state({**saved, "key_ratings": np.array([[key, 0, 9], [key, 1, 10]])})
    for number in range(3):
        again.rate("v1", 1.0, b"%d" % number, "acme", 20)
    assert again.report()["ratings_left_out"] == 2


def test_requests_that_are_dealt_one_by_one_count_each():
    analysis = CanaryAnalysis("tone", 1, SHARE, 0.01, 0)
    for number in range(40):
        analysis.observe(exchange(number % 2 == 0, b"app", 0.1, draw=b"%d" % number))
    report = analysis.report()
    assert (report["skipped"], report["askers"], report["dealt_by"]) == (0, 1, "request")
    analysis.observe(exchange(False, b"app", 0.1, draw=b"39"))
    assert analysis.report()["skipped"] == 1, "but for the turns of one conversation"


def test_of_a_version_that_is_meant_to_answer_otherwise_only_harm_is_compared_also_after_a_restart(tmp_path):
    began = analysing(tmp_path, candidate=2)
    began.observe(exchange(True, b"ana", 0.1))
    assert checks(began.analysis("tone")).keys() & {"mean_logprob", "length"} == set()
    assert not began.wants_logprobs("tone")
    began.save()
    again = analysing(tmp_path, candidate=2)
    again.start()
    assert checks(again.analysis("tone")) == checks(began.analysis("tone"))


def test_an_analysis_that_an_earlier_release_saved_goes_on(tmp_path):
    shutil.copy(TRIALS_OF_A74E6CF, tmp_path / FILE)
    monitor = analysing(tmp_path)
    monitor.start()
    analysis = monitor.analysis("tone")
    before = checks(analysis)
    assert before["inter_token"]["live_requests"] + before["inter_token"]["canary_requests"] == 400
    assert analysis.report()["requests_to_proof"] is None, "it begins to learn that now"
    rng = np.random.default_rng(1)
    for number in range(400):
        monitor.observe(exchange(bool(rng.random() < 0.5), b"new %d" % number, 0.1 * rng.lognormal(0, 0.1)))
    after = checks(analysis)
    assert after["inter_token"]["live_requests"] + after["inter_token"]["canary_requests"] == 800
    assert analysis.report()["requests_to_proof"] is not None
    monitor.save()
    again = analysing(tmp_path)
    again.start()
    assert again.report("tone") == monitor.report("tone")


async def test_the_report_and_the_metrics_say_what_a_proof_takes_and_where_the_limit_is(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    policy = replace(DEFAULT_POLICIES[0], alpha=0.001)
    async with connect(replace(watched, policies=(policy,))) as client:
        await push(client, make_adapter, 0, 1)
        await client.post("/v1/adapters/tone/canary", json={"version": 2, "weight": 0.5})
        await ask(client, 30)

        async def shown(line):
            return line in (await client.get("/metrics")).text

        assert await settled(lambda: shown('loradock_swap_threshold_log_evidence{adapter="tone",version="v2"} 6.9077'))
        unknown = 'loradock_canary_requests_to_proof{adapter="tone",bound="expected",version="v2"} +Inf'
        assert await settled(lambda: shown(unknown))
        await ask(client, 200)
        report = (await drift(client))["canary"]
        assert (report["requests"], report["askers"], report["skipped"], report["dealt_by"]) == (230, 230, 0, "asker")
        assert set(report["requests_to_proof"]) == {"low", "expected", "high"}
        required = {check["check"] for check in report["checks"] if check["requests_to_proof"]}
        assert required == {"inter_token", "first_token", "error", "ended_by_length", "refusal"}
