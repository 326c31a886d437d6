"""How jobs end beside what else happens: a stop while files are checked, a version that goes live first."""

from __future__ import annotations

import os
from pathlib import Path

from tests.serve.jobs.finetuning.conftest import begun, ended, parts_of
from tests.serve.jobs.finetuning.test_jobs import alive
from tests.support.app import upload
from tests.support.waiting import settled


async def checking(ai, file: Path) -> tuple[str, int]:
    """A new job, and the process that checks its examples and says so in this file."""
    id = await begun(ai)
    assert await settled(lambda: file.is_file() and file.read_text().endswith("\n"))
    process = int(file.read_text())
    file.unlink()
    return id, process


async def test_a_check_ends_with_its_job_and_with_its_server(training, sdk, tmp_path):
    file = tmp_path / "process"
    async with training() as client:
        ai = sdk(client)
        parts_of(client).fine_tuning.runner.process.command = ("/bin/sh", "-c", f"echo $$ > {file}; exec sleep 300")
        id, process = await checking(ai, file)
        assert os.getpgid(process) == process, "Ctrl+C at the server's terminal would fail the job"
        await ai.fine_tuning.jobs.cancel(id)
        assert await settled(lambda: not alive(process))
        id, process = await checking(ai, file)
    assert not alive(process)


async def test_a_version_that_goes_live_while_the_model_is_admitted_stays(training, sdk, make_adapter, monkeypatch):
    async with training() as client:
        ai = sdk(client)
        lifecycle = parts_of(client).lifecycle
        push = lifecycle.push

        async def slower(name, folder, **how):
            if how["promote"]:
                monkeypatch.setattr(lifecycle, "push", push)
                answer = await client.post("/v1/adapters", **upload(make_adapter()))
                assert answer.status_code == 201, answer.text
            return await push(name, folder, **how)

        monkeypatch.setattr(lifecycle, "push", slower)
        job = await ended(ai, await begun(ai))
        adapter = (await client.get("/v1/adapters/tone")).json()
        assert (job.status, job.fine_tuned_model, adapter["live"]) == ("succeeded", "tone@v2", 1)
