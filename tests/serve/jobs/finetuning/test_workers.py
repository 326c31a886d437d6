"""Jobs that other machines train: fetched over HTTP, told of, brought back and admitted as the server's own."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import httpx
import openai
import pytest

from serve.auth.auth import ANYBODY
from serve.client.api_client import Retry
from serve.client.fine_tuning_work_client import WorkClient
from serve.config import keys_hashed
from serve.errors import BadRequest, Conflict, Forbidden, NotFound, TooLarge, Unauthorized
from serve.models.checkpoint import digest_of
from tests.serve.jobs.finetuning.conftest import begun, ended, examples, messages, parts_of, sent, until
from tests.support.app import issued, upload
from tests.support.backend import FakeBackend
from tests.support.trainer import COMMAND
from tests.support.training_worker import Bridge, worker
from tests.support.waiting import settled

METHOD = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 10}}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("serve.jobs.finetuning.remote_worker.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("serve.jobs.finetuning.remote_worker.RENEW_SECONDS", 0.2)
    monkeypatch.setattr("serve.jobs.finetuning.trainer.WRITE_SECONDS", 0.1)


@pytest.fixture
def remote(training, config):
    """`async with remote(seconds=0.1) as client`: a server that leaves its jobs to workers."""
    return partial(training, replace(config, finetune_on="workers"))


@pytest.fixture
def working(tmp_path, tiny_model):
    """`async with working(client, "box") as worker`: a worker of the server behind a client, until it is stopped."""

    @asynccontextmanager
    async def started(client, name="box", model=tiny_model, key=None):
        made = await asyncio.to_thread(
            worker, "http://localhost", tmp_path / name, model, key, Bridge(client._transport)
        )
        thread = threading.Thread(target=made.run)
        thread.start()
        try:
            yield made
        finally:
            made.stop()
            await asyncio.to_thread(thread.join, 30)
            assert not thread.is_alive()

    return started


def by_hand(client, key=None, name="by-hand"):
    """What a worker asks, step by step."""
    return WorkClient("http://localhost", key, name, retry=Retry(attempts=1), transport=Bridge(client._transport))


async def claimed(client, hand, model, **more):
    """The job that a worker gets, once there is one."""
    async with asyncio.timeout(30):
        while (offer := await asyncio.to_thread(partial(hand.claim, [digest_of(str(model))], [], **more)))[
            "job"
        ] is None:
            await asyncio.sleep(0.02)
    return offer["job"]


async def queued(ai, **more):
    """The id of a job whose files were checked."""
    id = await begun(ai, **more)
    await until(ai, id, lambda job: job.status == "queued")
    return id


async def digest(client, model):
    name, _, version = model.partition("@v")
    return (await client.get(f"/v1/adapters/{name}")).json()["versions"][int(version) - 1]["digest"]


async def test_a_worker_trains_what_the_server_would_have(remote, working, sdk, tmp_path):
    async with remote() as client:
        ai, schedule = sdk(client), parts_of(client).fine_tuning.schedule
        schedule.trains = True
        mine = await ended(ai, await begun(ai, method=METHOD, suffix="mine"))
        undisturbed, told = await digest(client, mine.fine_tuned_model), await messages(ai, mine.id)
        schedule.trains = False
        id = await queued(ai, method=METHOD, validation_file=await sent(ai, examples(12)))
        await asyncio.sleep(0.3)
        assert (await ai.fine_tuning.jobs.retrieve(id)).status == "queued", "the server trains it itself"
        async with working(client):
            job = await ended(ai, id)
            assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, "tone@v1")
            assert await settled(lambda: not list((tmp_path / "box" / "jobs").iterdir())), "its data stayed"
        assert await digest(client, job.fine_tuned_model) == undisturbed
        hyperparameters = job.method.supervised.hyperparameters
        assert (hyperparameters.n_epochs, hyperparameters.batch_size, job.trained_tokens) == (3, 10, 600)
        said = await messages(ai, id)
        assert [line.partition(", validation")[0] for line in said[2:-2]] == told[2:-2]
        assert said[-1] == "The job has successfully completed" and said.count(said[-1]) == 1
        rows = (await ai.files.content(job.result_files[0])).text.splitlines()
        assert len(rows) == 7 and rows[0].startswith("step,train_loss")
        checkpoints = (await ai.fine_tuning.jobs.checkpoints.list(id)).data
        assert [row.step_number for row in checkpoints] == [6, 4, 2] and checkpoints[0].metrics.full_valid_loss
        text = (await client.get("/metrics")).text
        assert "loradock_finetune_tokens_total 1200.0" in text and "loradock_finetune_workers 1.0" in text


async def test_with_any_the_server_trains_and_so_do_its_workers(training, config, working, sdk, hold):
    async with training(replace(config, finetune_on="any"), hold=str(hold)) as client:
        ai = sdk(client)
        here = await begun(ai)
        await until(ai, here, lambda job: job.status == "running")
        async with working(client):
            there = await begun(ai, suffix="other")
            await until(ai, there, lambda job: job.status == "running")
            assert (await ai.fine_tuning.jobs.retrieve(here)).status == "running"
            hold.unlink()
            assert {(await ended(ai, id)).status for id in (here, there)} == {"succeeded"}


async def test_training_goes_on_from_an_adapter_that_the_worker_fetches(remote, working, sdk, make_adapter):
    async with remote() as client:
        ai = sdk(client)
        await client.post("/v1/adapters", **upload(make_adapter()))
        async with working(client):
            job = await ended(ai, await begun(ai, model="tone@v1", suffix=openai.omit))
        assert job.fine_tuned_model == "tone@v2" and (await client.get("/v1/adapters/tone")).json()["live"] == 1


async def test_a_job_on_a_base_that_a_worker_lacks_waits_for_another(remote, working, sdk, tmp_path, caplog):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    async with remote() as client:
        ai = sdk(client)
        id = await queued(ai)
        async with working(client, "other-box", other):
            assert await settled(lambda: "a job waits for the base base with the digest" in caplog.text)
            assert (await ai.fine_tuning.jobs.retrieve(id)).status == "queued"
        async with working(client):
            assert (await ended(ai, id)).status == "succeeded"


async def test_a_worker_that_never_returns_loses_its_job_after_a_minute(remote, working, sdk, tiny_model):
    async with remote() as client:
        ai = sdk(client)
        id = await queued(ai)
        rows, gone = parts_of(client).fine_tuning.rows, by_hand(client, name="gone")
        job = await claimed(client, gone, tiny_model)
        assert job["id"] == id and job["asked"]["key"] == "" and job["asked"]["who"] == ""
        await asyncio.to_thread(gone.launch, id)
        line = {"step": 1, "steps": 6, "train_loss": 2.0, "tokens": 100}
        await asyncio.to_thread(gone.advance, id, [line], 1.0, {"n_epochs": 3})
        async with working(client):
            await asyncio.sleep(0.3)
            assert (await asyncio.to_thread(gone.launch, id))["state"]["step"] == 1
            await asyncio.to_thread(_later, rows, 61)
            assert (await ended(ai, id)).status == "succeeded"
        for late in (gone.renew, gone.launch, gone.done):
            with pytest.raises(Conflict, match="is not this worker's"):
                await asyncio.to_thread(late, id)
        said = await messages(ai, id)
        assert said.count("The job has successfully completed") == said.count("Fine-tuning job started") == 1


def _later(rows, seconds):
    """The time of every claim, so much nearer to its end."""
    from sqlalchemy import update

    from serve.adapters.registry.tables import finetune_jobs

    with rows._registry.adding() as connection:
        until = finetune_jobs.c.claimed_until - seconds
        connection.execute(update(finetune_jobs).values(claimed_until=until))


async def test_a_job_is_paused_and_goes_on_at_its_worker_with_the_same_bytes(remote, working, sdk, monkeypatch, hold):
    async with remote() as client, working(client) as box:
        ai = sdk(client)
        undisturbed = await ended(ai, await begun(ai))
        monkeypatch.setenv("STAND_IN", json.dumps({"hold": str(hold)}))
        id = await begun(ai, suffix="other")
        await until(ai, id, lambda job: job.status == "running" and box.process.pid)

        async def one_step():
            return "Step 1/6: training loss=2.00" in await messages(ai, id)

        assert await settled(one_step)
        assert (await ai.fine_tuning.jobs.pause(id)).status == "paused"
        assert await settled(lambda: box.process.pid is None)
        monkeypatch.setenv("STAND_IN", "{}")
        await ai.fine_tuning.jobs.resume(id)
        job = await ended(ai, id)
        assert job.status == "succeeded"
        assert await digest(client, job.fine_tuned_model) == await digest(client, undisturbed.fine_tuned_model)
        steps = [message for message in await messages(ai, id) if message.startswith("Step")]
        assert len(steps) == len(set(steps)) == 6


async def test_a_job_that_is_cancelled_stops_at_its_worker_and_leaves_nothing(remote, working, sdk, tmp_path, hold):
    async with remote(hold=str(hold)) as client, working(client) as box:
        ai = sdk(client)
        id = await begun(ai)
        await until(ai, id, lambda job: job.status == "running" and box.process.pid)
        await ai.fine_tuning.jobs.cancel(id)
        assert await settled(lambda: box.process.pid is None and not list((tmp_path / "box" / "jobs").iterdir()))


async def test_a_worker_that_is_stopped_gives_its_job_back_with_what_it_saved(remote, working, sdk, tmp_path, hold):
    async with remote(hold=str(hold)) as client:
        ai = sdk(client)
        async with working(client) as box:
            id = await begun(ai)
            await until(ai, id, lambda job: job.status == "running" and box.process.pid)
        row = await asyncio.to_thread(parts_of(client).fine_tuning.rows.claim, id, 1.0)
        assert row is not None, "it kept its claim"
        await asyncio.to_thread(parts_of(client).fine_tuning.rows.release, id)
        assert (tmp_path / "box" / "jobs" / id).is_dir()
        hold.unlink()
        async with working(client):
            assert (await ended(ai, id)).status == "succeeded"


async def test_what_goes_wrong_at_a_worker_is_the_jobs_error_or_another_try(remote, working, sdk, monkeypatch, hold):
    async with remote(error="training diverged at step 1") as client, working(client) as box:
        ai = sdk(client)
        job = await ended(ai, await begun(ai))
        assert job.status == "failed" and job.error.message.endswith("training diverged at step 1")
        assert (await client.get("/v1/adapters")).json()["data"] == []
        monkeypatch.setenv("STAND_IN", json.dumps({"hold": str(hold)}))
        id = await begun(ai)
        await until(ai, id, lambda job: job.status == "running" and box.process.pid)
        os.kill(box.process.pid, signal.SIGKILL)
        hold.unlink()
        assert (await ended(ai, id)).status == "succeeded"
        assert "The training process ended (signal 9): it is started again" in await messages(ai, id)


async def test_a_worker_without_room_leaves_the_job_to_others(remote, working, sdk, monkeypatch, caplog):
    async with remote() as client:
        ai = sdk(client)
        with monkeypatch.context() as full:

            def fetch(*_):
                raise OSError(28, "No space left on device")

            full.setattr(WorkClient, "fetch", fetch)
            async with working(client, "full-box"):
                id = await queued(ai)
                assert await settled(lambda: f"{id} is not trained here now" in caplog.text)
        async with working(client):
            assert (await ended(ai, id)).status == "succeeded"


async def test_a_server_that_starts_again_lets_its_workers_go_on(remote, working, sdk, tiny_model):
    async with remote() as client:
        id = await queued(sdk(client))
        hand = by_hand(client)
        await claimed(client, hand, tiny_model)
        await asyncio.to_thread(hand.launch, id)
    async with remote() as client:
        other, hand = by_hand(client, name="other"), by_hand(client)
        assert (await asyncio.to_thread(other.claim, [digest_of(str(tiny_model))], []))["job"] is None
        await asyncio.to_thread(hand.renew, id)


async def test_a_proxy_whose_server_is_away_is_asked_again(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("serve.jobs.finetuning.remote_worker.LOOK_SECONDS", 0.01)
    statuses, nothing = iter([502, 503, 504]), {"job": None, "missing": {}, "ended": []}

    def answered(request):
        if status := next(statuses, None):
            return httpx.Response(status, text="<html>Bad Gateway</html>")
        return httpx.Response(200, json=nothing)

    box = worker("http://localhost", tmp_path / "box", tiny_model, transport=httpx.MockTransport(answered))
    await asyncio.to_thread(partial(box.run, once=True))
    assert next(statuses, None) is None


class ByTurns(httpx.BaseTransport):
    """A balancer: each request goes to the next server."""

    def __init__(self, clients):
        self._servers = itertools.cycle([Bridge(client._transport) for client in clients])

    def handle_request(self, request):
        return next(self._servers).handle_request(request)


@pytest.fixture
def pair(training, connect, config, tiny_model, tmp_path):
    """Two servers of one registry that leave their jobs to workers."""

    @asynccontextmanager
    async def started(blobs=f"file://{tmp_path}/shared", **how):
        one = replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=blobs, finetune_on="workers")
        other = connect(replace(one, data_dir=tmp_path / "other"), FakeBackend(str(tiny_model)))
        other.app.state.parts.fine_tuning.runner.process.command = COMMAND
        async with training(one, **how) as here, other as there:
            yield here, there

    return started


async def test_a_worker_behind_a_balancer_brings_each_file_to_another_server(pair, sdk, tiny_model, tmp_path):
    async with pair() as (here, there):
        ai = sdk(here)
        box = await asyncio.to_thread(
            worker, "http://localhost", tmp_path / "box", tiny_model, None, ByTurns([here, there])
        )
        running = asyncio.create_task(asyncio.to_thread(box.run))
        try:
            job = await ended(ai, await begun(ai, method=METHOD))
            assert (job.status, job.error) == ("succeeded", None)
            assert len((await ai.fine_tuning.jobs.checkpoints.list(job.id)).data) == 3
            assert len((await ai.files.content(job.result_files[0])).text.splitlines()) == 7
            # Nothing of it is left where all servers look, but files that have rows.
            assert not [path.name for path in (tmp_path / "shared" / "files").iterdir() if job.id in path.name]
        finally:
            box.stop()
            await running


async def test_without_a_shared_folder_a_worker_is_told_to_ask_one_server(pair, sdk, tiny_model, tmp_path):
    async with pair(blobs="") as (here, there):
        id = await queued(sdk(here))
        one, two = by_hand(here), by_hand(there)
        await claimed(here, one, tiny_model)
        await asyncio.to_thread(one.launch, id)
        file = tmp_path / "adapter_config.json"
        file.write_text("{}")
        await asyncio.to_thread(one.bring, id, f"adapter/{file.name}", file)
        with pytest.raises(BadRequest, match="give the worker the address of one of them"):
            await asyncio.to_thread(two.done, id)


@pytest.fixture
async def guarded(training, config):
    """An operator's client of a server with keys that leaves its jobs to workers."""
    config = replace(config, admin_keys=keys_hashed(["run"]), finetune_on="workers")
    async with training(config) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


def key_of(client):
    return client.headers["authorization"].removeprefix("Bearer ")


async def test_examples_go_to_a_worker_with_an_operators_key_and_its_claim(guarded, sdk, tiny_model):
    anna = await issued(guarded, "acme")
    id = await queued(sdk(anna))
    for other in (anna, await issued(guarded, "default")):
        with pytest.raises(Forbidden, match="finetune:work"):
            await asyncio.to_thread(by_hand(guarded, key_of(other)).claim, [], [])
    refused = await guarded.post("/v1/keys", json={"tenant": "acme", "name": "box", "scopes": ["finetune:work"]})
    assert refused.status_code == 400 and "finetune:work is for operators" in refused.json()["error"]["message"]
    keys = [key_of(await issued(guarded, "default", "finetune:work", name=name)) for name in ("box", "tub")]
    box, tub = (by_hand(guarded, key) for key in keys)
    assert (await claimed(guarded, box, tiny_model))["id"] == id
    with pytest.raises(Conflict, match="is not this worker's"):
        await asyncio.to_thread(tub.fetch, id, "training.jsonl", tiny_model.parent / "stolen")
    with pytest.raises(Conflict, match="is not this worker's"):
        await asyncio.to_thread(tub.fail, id, "training_failed", "no", None, [])
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/adapters", "/v1/keys"):
        assert (await guarded.get(path, headers={"authorization": f"Bearer {keys[0]}"})).status_code == 403
    lines = (parts_of(guarded).audit.path).read_text()
    assert f"{id} by by-hand" in lines and "claim_work" in lines


async def test_a_worker_whose_key_is_revoked_stops_training(guarded, sdk, tiny_model, tmp_path, monkeypatch, hold):
    asked = {"tenant": "default", "name": "box", "scopes": ["finetune:work"]}
    key = (await guarded.post("/v1/keys", json=asked)).json()
    monkeypatch.setenv("STAND_IN", json.dumps({"hold": str(hold)}))
    box = worker("http://localhost", tmp_path / "box", tiny_model, key["secret"], Bridge(guarded._transport))
    running = asyncio.create_task(asyncio.to_thread(box.run))
    await until(sdk(guarded), await begun(sdk(guarded)), lambda job: job.status == "running" and box.process.pid)
    assert (await guarded.delete(f"/v1/keys/{key['id']}")).status_code == 200
    try:
        with pytest.raises(Unauthorized):
            await asyncio.wait_for(asyncio.shield(running), 60)
        assert box.process.pid is None
    finally:
        box.stop()


async def test_what_a_worker_may_bring_has_names_and_sizes(remote, sdk, tiny_model, tmp_path, monkeypatch):
    async with remote() as client:
        id = await queued(sdk(client))
        hand = by_hand(client)
        await claimed(client, hand, tiny_model)
        file = tmp_path / "file"
        file.write_bytes(b"x" * 2000)
        for name in ("../../registry.db", "adapter/../recipe.yaml", "recipe.yaml", "checkpoints/adapter_config.json"):
            with pytest.raises((BadRequest, NotFound)):
                await asyncio.to_thread(hand.bring, id, name, file)
        with pytest.raises(NotFound, match="is trained without"):
            await asyncio.to_thread(hand.fetch, id, "validation.jsonl", tmp_path / "none")
        await asyncio.to_thread(hand.bring, id, "adapter/adapter_config.json", file)
        with pytest.raises(BadRequest, match="is not whole"):
            await asyncio.to_thread(hand.done, id)
        monkeypatch.setattr(parts_of(client).fine_tuning.workers.files, "_max_bytes", 1000)
        answer = await client.put(f"/v1/fine_tuning/work/{id}/files/settings.json?worker=by-hand", content=b"x" * 2000)
        assert answer.status_code == 413
        await asyncio.to_thread(hand.fetch, id, "training.jsonl", tmp_path / "train")
        assert (tmp_path / "train").read_bytes() == examples()


async def test_a_worker_brings_a_few_checkpoints_and_no_more(remote, sdk, tiny_model, tmp_path):
    async with remote() as client:
        id = await queued(sdk(client))
        hand = by_hand(client)
        await claimed(client, hand, tiny_model)
        file = tmp_path / "file"
        file.write_bytes(b"{}")
        for step in (*range(1, 11), 1):
            await asyncio.to_thread(hand.bring, id, f"checkpoints/step-{step:06}/adapter_config.json", file)
        with pytest.raises(TooLarge, match="10 checkpoints at most"):
            await asyncio.to_thread(hand.bring, id, "checkpoints/step-000011/adapter_config.json", file)


async def test_a_file_that_is_here_after_its_claim_ended_is_not_taken(remote, sdk, tiny_model, tmp_path):
    async with remote() as client:
        ai = sdk(client)
        id = await queued(ai)
        await claimed(client, by_hand(client), tiny_model)
        workers = parts_of(client).fine_tuning.workers

        async def slow():
            yield b"{}"
            await ai.fine_tuning.jobs.cancel(id)
            yield b" "

        with pytest.raises(Conflict, match="is not this worker's"):
            await workers.put(ANYBODY, "by-hand", id, "settings.json", slow(), 0)
        assert not list(workers.files.incoming(id).glob("settings.json*"))


async def test_a_server_that_trains_itself_has_no_work(training):
    async with training() as client:
        with pytest.raises(BadRequest, match="trains its jobs itself"):
            await asyncio.to_thread(by_hand(client).claim, [], [])
