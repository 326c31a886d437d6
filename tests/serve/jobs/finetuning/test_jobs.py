"""Fine-tuning over HTTP, asked by OpenAI's own client: from an upload to a model that answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace

import openai
import pytest

from serve.config import keys_hashed
from serve.errors import OutOfSpace
from serve.jobs.finetuning.training_process import Checked
from tests.serve.jobs.finetuning.conftest import begun, ended, examples, messages, parts_of, sent, stepped
from tests.support.app import issued, upload
from tests.support.waiting import settled


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_file_of_examples_becomes_a_model_that_answers(training, sdk):
    async with training() as client:
        ai = sdk(client)
        validation = await sent(ai, examples(12))
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 10}}}
        id = await begun(ai, validation_file=validation, method=method, metadata={"team": "a"})
        made = await ai.fine_tuning.jobs.retrieve(id)
        assert made.object == "fine_tuning.job" and made.id.startswith("ftjob-") and made.seed == 7
        assert made.method.supervised.hyperparameters.n_epochs == 3 and made.metadata == {"team": "a"}
        job = await ended(ai, id)
        assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, "tone@v1")
        assert job.trained_tokens == 600 and job.created_at <= job.finished_at
        assert job.hyperparameters.n_epochs == 3 and job.hyperparameters.learning_rate_multiplier == "auto"
        answer = await ai.chat.completions.create(model=job.fine_tuned_model, messages=[])
        adapter = (await client.get("/v1/adapters/tone")).json()
        assert answer.model == adapter["versions"][0]["id"] and adapter["live"] == 1
        provenance = adapter["versions"][0]["provenance"]
        assert provenance["origin"] == f"fine-tuning job {id}" and provenance["base_model"] == "base"
        assert len(provenance["data_digest"]) == len(provenance["base_digest"]) == 64
        assert f"fine-tuning job {id}" in {entry["why"] for entry in adapter["history"]}
        said = await messages(ai, id)
        assert said[0] == f"Created fine-tuning job: {id}"
        assert said[2:5] == [
            "Files validated, moving job to queued state", "Fine-tuning job started",
            "Step 1/6: training loss=2.00",
        ]  # fmt: skip
        assert said[-2:] == ["New fine-tuned model created: tone@v1", "The job has successfully completed"]


async def test_events_and_checkpoints_and_results_are_listed_page_by_page(training, sdk):
    async with training() as client:
        ai = sdk(client)
        id = await begun(ai, method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}})
        job = await ended(ai, id)
        events = [event async for event in ai.fine_tuning.jobs.list_events(id, limit=2)]
        assert len(events) == 13 and len({event.id for event in events}) == 13
        assert [event.data["step"] for event in events if event.type == "metrics"] == [6, 5, 4, 3, 2, 1]
        checkpoints = [row async for row in ai.fine_tuning.jobs.checkpoints.list(id, limit=1)]
        assert [(row.step_number, row.fine_tuned_model_checkpoint) for row in checkpoints] == [
            (6, job.fine_tuned_model), (4, "tone@v3"), (2, "tone@v2"),
        ]  # fmt: skip
        assert checkpoints[0].metrics.train_loss == pytest.approx(2 / 6)
        for row in checkpoints:
            assert (await ai.chat.completions.create(model=row.fine_tuned_model_checkpoint, messages=[])).model
        (result,) = job.result_files
        rows = (await ai.files.content(result)).text.splitlines()
        assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(rows) == 7
        assert (await ai.files.retrieve(result)).purpose == "fine-tune-results"
        with pytest.raises(openai.BadRequestError, match="after takes an id of this list"):
            await ai.fine_tuning.jobs.list_events(id, after="ftevent-1-1")


async def test_jobs_are_listed_the_latest_first_and_by_metadata(training, sdk):
    async with training() as client:
        ai = sdk(client)
        ids = [await begun(ai, metadata={"night": str(number % 2)}) for number in range(4)]
        listed = [job.id async for job in ai.fine_tuning.jobs.list(limit=1)]
        assert listed == ids[::-1]
        assert [job.id async for job in ai.fine_tuning.jobs.list(metadata={"night": "1"})] == [ids[3], ids[1]]
        with pytest.raises(openai.RateLimitError, match="this tenant has 4 fine-tuning jobs"):
            await begun(ai)
        for id in ids:
            await ended(ai, id)


async def test_training_goes_on_from_an_adapter_and_what_is_live_stays(training, sdk, make_adapter):
    async with training() as client:
        ai = sdk(client)
        await client.post("/v1/adapters", **upload(make_adapter()))
        job = await ended(ai, await begun(ai, model="tone@v1", suffix=openai.omit))
        adapter = (await client.get("/v1/adapters/tone")).json()
        assert job.fine_tuned_model == "tone@v2" and adapter["live"] == 1
        assert adapter["versions"][-1]["checks"]["parent"] == "tone@v1"
        with pytest.raises(openai.BadRequestError, match="rank is that of the adapter to go on from"):
            method = {"type": "supervised", "supervised": {"hyperparameters": {"rank": 4}}}
            await begun(ai, model="tone", method=method)


async def test_without_a_suffix_the_job_gives_the_name(training, sdk):
    async with training() as client:
        ai = sdk(client)
        id = await begun(ai, suffix=openai.omit)
        assert (await ended(ai, id)).fine_tuned_model == f"ft-{id[6:14]}@v1"


async def test_a_job_that_is_cancelled_leaves_nothing(training, sdk):
    async with training(seconds=2.0) as client:
        ai = sdk(client)
        file = await sent(ai)
        id = await begun(ai, training_file=file)
        process = await stepped(client, id)
        with pytest.raises(openai.ConflictError, match=f"{file} is read by {id}"):
            await ai.files.delete(file)
        assert (await ai.fine_tuning.jobs.cancel(id)).status == "cancelled"
        folder = parts_of(client).fine_tuning.runner.folders.folder(id).path
        assert await settled(lambda: not alive(process) and not folder.exists())
        assert (await client.get("/v1/adapters")).json()["data"] == []
        assert (await messages(ai, id))[-1] == "Fine-tuning job was cancelled"
        for verb in ("cancel", "pause", "resume"):
            with pytest.raises(openai.ConflictError, match=f"Cannot {verb} a job with status 'cancelled'"):
                await getattr(ai.fine_tuning.jobs, verb)(id)
        assert (await ai.files.delete(file)).deleted


async def digest_of(client, model):
    name, _, version = model.partition("@v")
    return (await client.get(f"/v1/adapters/{name}")).json()["versions"][int(version) - 1]["digest"]


async def test_a_job_that_was_paused_ends_with_the_same_bytes(training, sdk, monkeypatch, hold):
    async with training() as client:
        ai = sdk(client)
        undisturbed = await ended(ai, await begun(ai))
        monkeypatch.setenv("STAND_IN", json.dumps({"hold": str(hold)}))
        id = await begun(ai, suffix="other")
        process = await stepped(client, id)
        assert (await ai.fine_tuning.jobs.pause(id)).status == "paused"
        assert await settled(lambda: not alive(process))
        await asyncio.sleep(0.3)
        assert (await ai.fine_tuning.jobs.retrieve(id)).status == "paused"
        hold.unlink()
        assert (await ai.fine_tuning.jobs.resume(id)).status == "queued"
        job = await ended(ai, id)
        assert job.status == "succeeded"
        assert await digest_of(client, job.fine_tuned_model) == await digest_of(client, undisturbed.fine_tuned_model)
        steps = [message for message in await messages(ai, id) if message.startswith("Step")]
        assert len(steps) == len(set(steps)) == 6


async def test_a_job_survives_the_end_of_its_server_and_of_its_process(training, sdk, hold):
    async with training(hold=str(hold)) as client:
        id = await begun(sdk(client))
        process = await stepped(client, id)
    assert not alive(process)
    async with training(hold=str(hold)) as client:
        ai = sdk(client)
        process = await stepped(client, id, 2)
        os.kill(process, signal.SIGKILL)
        hold.unlink()
        job = await ended(ai, id)
        assert (job.status, job.fine_tuned_model) == ("succeeded", "tone@v1")
        said = await messages(ai, id)
        assert said.count("Fine-tuning job started") == said.count("The job has successfully completed") == 1
        assert "The training process ended (signal 9): it is started again" in said
        assert len((await ai.files.content(job.result_files[0])).text.splitlines()) == 7


async def test_a_process_that_always_dies_is_given_up(training, sdk, monkeypatch):
    monkeypatch.setattr("serve.jobs.finetuning.trainer.AGAIN_SECONDS", 0.01)
    monkeypatch.setattr("serve.jobs.finetuning.trainer.LAUNCHES", 2)
    async with training() as client:
        ai = sdk(client)
        monkeypatch.setattr(parts_of(client).fine_tuning.runner.process, "check", lambda *asked: Checked(20))
        parts_of(client).fine_tuning.runner.process.command = ("/bin/sh", "-c", "kill -9 $$")
        job = await ended(ai, await begun(ai))
        assert (job.status, job.error.code) == ("failed", "training_failed")
        assert "ended 2 times without coming further" in job.error.message


async def test_a_process_without_a_sign_of_life_is_started_again(training, sdk, monkeypatch):
    monkeypatch.setattr("serve.jobs.finetuning.trainer.AGAIN_SECONDS", 0.01)
    ended_for_that = "The training process ended (no step for too long): it is started again"
    async with training(seconds=0.01, hang=4) as client:
        ai = sdk(client)
        parts_of(client).fine_tuning.runner.process.stall = 0.5
        id = await begun(ai)

        async def restarted_twice():  # what was started again hangs again
            return (await messages(ai, id)).count(ended_for_that) >= 2

        assert await settled(restarted_twice)
        assert (await ai.fine_tuning.jobs.cancel(id)).status == "cancelled"


async def test_what_the_trainer_says_is_the_jobs_error(training, sdk):
    async with training(error="training diverged at step 1: take a smaller learning_rate") as client:
        ai = sdk(client)
        job = await ended(ai, await begun(ai))
        assert job.status == "failed" and job.error.code == "training_failed"
        assert job.error.message.endswith("training diverged at step 1: take a smaller learning_rate")
        assert (await client.get("/v1/adapters")).json()["data"] == []


async def test_a_model_that_changes_nothing_is_not_admitted(training, sdk):
    async with training(nothing=True) as client:
        ai = sdk(client)
        job = await ended(ai, await begun(ai))
        assert (job.status, job.error.code) == ("failed", "model_rejected")
        assert (await client.get("/v1/adapters")).json()["data"] == []


async def test_a_base_that_is_another_by_then_ends_the_job(training, sdk, tiny_model, hold):
    async with training(hold=str(hold)) as client:
        ai = sdk(client)
        id = await begun(ai)
        process = await stepped(client, id)
        await ai.fine_tuning.jobs.pause(id)
        assert await settled(lambda: not alive(process)), "who resumes before that lets it go on"
        config = tiny_model / "config.json"
        before = config.read_bytes()
        try:
            config.write_bytes(before.replace(b"llama", b"llama "))
            await ai.fine_tuning.jobs.resume(id)
            job = await ended(ai, id)
        finally:
            config.write_bytes(before)
        assert (job.status, job.error.code, job.error.param) == ("failed", "base_model_changed", "model")


async def test_a_full_disk_is_a_sentence(training, sdk, monkeypatch):
    async with training() as client:
        ai = sdk(client)
        file = await sent(ai)

        def full(tenant, kind, more=0):
            raise OutOfSpace("the disk has 1 MiB free")

        monkeypatch.setattr(parts_of(client).store.ledger, "check", full)
        job = await ended(ai, await begun(ai, training_file=file))
        assert (job.status, job.error.code, job.error.message) == (
            "failed", "insufficient_storage", "the disk has 1 MiB free",
        )  # fmt: skip


async def test_hours_of_training_have_an_end(training, sdk, config):
    async with training(replace(config, finetune_hours=1e-5), seconds=0.3) as client:
        ai = sdk(client)
        job = await ended(ai, await begun(ai))
        assert (job.status, job.error.code) == ("failed", "timeout")


async def test_training_is_suspended_while_clients_are_answered(training, sdk):
    async with training(seconds=0.05) as client:
        ai, process = sdk(client), parts_of(client).fine_tuning.runner.process
        busy = [True]
        process.is_busy = lambda: busy[0]
        id = await begun(ai)
        assert await settled(lambda: process.suspended)
        stopped = process.pid
        await asyncio.sleep(0.3)
        assert (await asyncio.to_thread(state_of, stopped)) == "T"
        assert "loradock_finetune_suspended 1.0" in (await client.get("/metrics")).text
        busy[0] = False
        assert (await ended(ai, id)).status == "succeeded"
        text = (await client.get("/metrics")).text
        assert 'loradock_finetune_jobs_ended_total{status="succeeded"} 1.0' in text
        assert "loradock_finetune_tokens_total 600.0" in text and "loradock_finetune_suspended 0.0" in text


def state_of(process):
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.fixture
async def shared(training, config):
    """An operator's client of a server with keys whose trainer is the stand-in."""
    async with training(replace(config, admin_keys=keys_hashed(["run"])), seconds=0.05) as client:
        client.headers["authorization"] = "Bearer run"
        yield client


async def test_no_route_shows_another_tenants_job(shared, sdk):
    anna, gus = [await issued(shared, tenant) for tenant in ("acme", "gus")]
    theirs, ai = sdk(gus), sdk(anna)
    file = await sent(ai)
    id = await begun(ai, training_file=file)
    jobs = theirs.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="Could not find fine tune"):
            await ask(id)
        with pytest.raises(openai.NotFoundError):  # nor to an operator
            await sdk(shared).fine_tuning.jobs.retrieve(id)
    assert [job async for job in jobs.list()] == []
    with pytest.raises(openai.BadRequestError, match="after takes an id of this list"):
        await jobs.list(after=id)
    for param in ("training_file", "validation_file"):
        with pytest.raises(openai.BadRequestError, match="No such File object"):
            await begun(theirs, **{param: file})
    job = await ended(ai, id)
    for ask in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
        with pytest.raises(openai.NotFoundError):
            await ask(job.result_files[0])
    for model in ("tone", job.fine_tuned_model, "acme/tone", f"acme/{job.fine_tuned_model}"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await theirs.chat.completions.create(model=model, messages=[])
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await begun(theirs, model=model)
    assert (await anna.get("/v1/adapters")).json()["data"][0]["name"] == "tone"
    assert (await gus.get("/v1/adapters")).json()["data"] == []


async def test_what_another_tenant_shares_is_asked_and_not_trained_on(shared, sdk, make_adapter):
    await shared.post("/v1/adapters", **upload(make_adapter(), visibility="shared"))
    ai = sdk(await issued(shared, "acme"))
    assert await ai.chat.completions.create(model="tone", messages=[])
    with pytest.raises(openai.BadRequestError, match="nobody else trains on from it"):
        await begun(ai, model="tone")


async def test_a_key_needs_the_right_to_change_adapters_until_the_end(shared, sdk):
    ai = sdk(await issued(shared, "acme", "inference"))
    file = await sent(ai)
    with pytest.raises(openai.PermissionDeniedError, match="adapters:write"):
        await begun(ai, training_file=file)
    ai = sdk(await issued(shared, "acme", name="soon-gone"))
    id = await begun(ai)
    await ai.fine_tuning.jobs.pause(id)
    keys = (await shared.get("/v1/keys")).json()["data"]
    (gone,) = [key["id"] for key in keys if key["name"] == "soon-gone"]
    await shared.delete(f"/v1/keys/{gone}")
    ai = sdk(await issued(shared, "acme"))
    await ai.fine_tuning.jobs.resume(id)
    job = await ended(ai, id)
    assert job.status == "failed" and "not taken any more" in job.error.message
    ai = sdk(await issued(shared, "other", adapters=1))
    assert (await ended(ai, await begun(ai))).status == "succeeded"
    with pytest.raises(openai.RateLimitError, match="may keep 1 adapters"):
        await begun(ai, suffix="second")


REFUSED = {
    "model": ({"model": "nobody"}, openai.NotFoundError, "The model `nobody` does not exist"),
    "file": ({"training_file": "file-nowhere"}, openai.BadRequestError, "No such File object: file-nowhere"),
    "suffix": ({"suffix": "no spaces"}, openai.BadRequestError, "suffix is the adapter's name here"),
    "base's name": ({"suffix": "base"}, openai.ConflictError, "suffix is the adapter's name here"),
    "method": ({"method": {"type": "reinforcement"}}, openai.BadRequestError, "method.type"),
    "other method": ({"method": {"type": "dpo", "supervised": {}}}, openai.BadRequestError, "leave the other method's"),
    "beta": ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
             openai.BadRequestError, "beta is a hyperparameter of the method dpo"),
    "epochs": ({"hyperparameters": {"n_epochs": 0}}, openai.BadRequestError, "hyperparameters.n_epochs"),
    "rank": ({"hyperparameters": {"rank": 99}}, openai.BadRequestError, "rank 99 is above the 16"),
    "integrations": ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, openai.BadRequestError,
                     "integrations"),
    "seed": ({"seed": -1}, openai.BadRequestError, "seed"),
    "metadata": ({"metadata": {str(number): "" for number in range(17)}}, openai.BadRequestError, "up to 16 entries"),
}  # fmt: skip


async def test_what_cannot_be_a_job_is_refused_in_a_sentence(training, sdk, config):
    async with training() as client:
        ai = sdk(client)
        for more, kind, sentence in REFUSED.values():
            with pytest.raises(kind, match=sentence) as refused:
                await begun(ai, **more)
            if "suffix" in more:
                assert refused.value.body["param"] == "suffix"
        batch = await ai.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
        with pytest.raises(openai.BadRequestError, match="send a file with `fine-tune`"):
            await begun(ai, training_file=batch.id)
        file = await sent(ai)
        with pytest.raises(openai.BadRequestError, match="are one file"):
            await begun(ai, training_file=file, validation_file=file)
        assert [job async for job in ai.fine_tuning.jobs.list()] == []
    async with training(replace(config, finetune_open=0)) as client:
        with pytest.raises(openai.BadRequestError, match="this server trains nothing"):
            await begun(sdk(client))


NO_LINES = {
    "text": (b"hello\n", "Line 1 is not JSON"),
    "list": (b"[1]\n", r"Line 1 is not a dictionary \(HINT: line starts with: \[1\]\)"),
    "second line": (b'{}\n"a"\n', "Line 2 is not a dictionary"),
    "binary": (b"\xff\xfe{\x00}\x00", "Line 1 is not JSON"),
    "nothing": (b"\n\n", "The file is empty"),
}


async def test_a_file_without_an_object_a_line_is_not_taken(training, sdk):
    async with training() as client:
        ai = sdk(client)
        for data, sentence in NO_LINES.values():
            with pytest.raises(openai.BadRequestError, match=sentence) as error:
                await sent(ai, data)
            assert error.value.code == "invalid_file_format"
        assert [file async for file in ai.files.list()] == []


async def test_a_job_that_this_server_cannot_run_is_refused_when_it_is_made(training, sdk, monkeypatch):
    async with training() as client:
        ai = sdk(client)
        file = await sent(ai)
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(openai.BadRequestError, match=r"cannot train: peft is not installed.*--finetune-on workers"):
            await begun(ai, training_file=file)
        assert (await ai.fine_tuning.jobs.list()).data == []


async def test_what_workers_run_needs_nothing_of_this_server(training, sdk, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    async with training(replace(config, finetune_on="workers")) as client:
        assert await begun(sdk(client))


async def test_a_list_takes_as_much_metadata_as_a_job_may_have(client):
    for count, status in ((16, 200), (17, 400), (900, 400)):
        asked = await client.get(
            "/v1/fine_tuning/jobs", params={f"metadata[k{number}]": "v" for number in range(count)}
        )
        assert asked.status_code == status, asked.text
