"""A source that its own client reads: in a process that gets so many bytes and seconds, and leads nowhere else."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from serve.adapters.sources import client_process, transfer
from serve.config import keys_hashed

SOURCE = "mlflow://models/tone/3"
# A client whose third line of defence is the server's own.
PROGRAM = """
import json, os, sys, time
asked = json.loads(sys.stdin.readline())
def say(**answer): print(json.dumps(answer), flush=True)
{before}
say(place={place!r}, version="3", host="tracking:5000")
names = json.loads(sys.stdin.readline())["names"]
{after}
say(done=True)
"""
COPY = """
for name in names:
    if os.path.exists(os.path.join({folder!r}, name)):
        open(name, "wb").write(open(os.path.join({folder!r}, name), "rb").read())
"""


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Write the client that runs: where it says the files are, and what it does."""
    file = tmp_path / "client.py"
    monkeypatch.setitem(client_process.PROGRAMS, "mlflow", (str(file), "mlflow-skinny"))

    def write(place="mlflow-artifacts:/1/tone", before="", after=""):
        file.write_text(PROGRAM.format(place=place, before=before, after=after))

    return write


async def push(client, source=SOURCE, **more):
    return await client.post("/v1/adapters", json={"name": "tone", "source": source, **more})


async def test_what_the_client_brings_is_judged_like_any_upload(client, config, program, make_adapter):
    program(after=COPY.format(folder=str(make_adapter())))
    done = await push(client)
    assert done.status_code == 201, done.text
    assert done.json()["provenance"] == {"source": SOURCE, "source_version": "3"}
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    assert history[0]["why"] == f"from {SOURCE} (3)"
    assert not list((config.data_dir / "quarantine").iterdir())


async def test_a_folder_of_this_machine_is_read_by_the_server_below_its_roots_alone(
    connect, config, program, make_adapter, tmp_path
):
    program(place=f"file://{make_adapter()}", after="raise SystemExit(1)")
    async with connect(config) as client:
        assert (await push(client)).status_code == 403
    async with connect(replace(config, source_roots=(str(tmp_path),))) as client:
        done = await push(client)
        assert (done.status_code, done.json()["provenance"]["source_version"]) == (201, "3"), done.text


@pytest.mark.parametrize(
    "place",
    [
        "http://169.254.169.254/latest", "https://elsewhere.example.org/x", "mlflow-artifacts://elsewhere/x",
        "dbfs:/x", "gs://bucket/x", "hdfs://x/y", "ftp://x/y", "file://host/etc", "", "sftp://x", "http://tracking:5000/x",
        "https://elsewhere\\@tracking:5000/x", "mlflow-artifacts://elsewhere\\@tracking:5000/x", "https://me@tracking:5000/x",
        "https://named.example.org/x",
    ],
)  # fmt: skip
async def test_a_tracking_server_leads_nowhere_else(connect, config, program, make_adapter, place):
    """Nor with its key to a host that may be named as a source of its own."""
    program(place=place, after=COPY.format(folder=str(make_adapter())))
    async with connect(replace(config, source_hosts=("named.example.org",))) as client:
        refused = await push(client)
    assert refused.status_code == 400 and "does not read" in refused.json()["error"]["message"], refused.text


@pytest.mark.parametrize(
    "place", ["s3://bucket/x", "mlflow-artifacts:/x", "mlflow-artifacts://tracking:5000/x", "https://tracking:5000/x"]
)
async def test_it_may_lead_to_itself_and_object_storage(client, program, make_adapter, place):
    program(place=place, after=COPY.format(folder=str(make_adapter())))
    assert (await push(client)).status_code == 201


async def test_a_client_that_fills_the_disk_or_never_ends_is_ended(connect, config, program, monkeypatch, tmp_path):
    mark = tmp_path / "pid"
    fill = f"open({str(mark)!r}, 'w').write(str(os.getpid()))\n" + (
        "for n in range(100):\n open(f'part-{n}', 'wb').write(bytes(50_000)); time.sleep(0.05)\n"
    )
    program(after=fill)
    async with connect(replace(config, max_upload_bytes=400_000)) as client:
        assert (await push(client)).status_code == 413
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    monkeypatch.setattr(transfer, "SECONDS", 0.5)
    program(after="time.sleep(3600)")
    async with connect(config) as client:
        late = await push(client)
    assert late.status_code == 400 and "longer than" in late.text
    assert not list((config.data_dir / "quarantine").iterdir())


@pytest.mark.parametrize(
    "before, status, word",
    [
        ('say(error="missing package"); sys.exit()', 400, "mlflow-skinny is not installed"),
        ('say(error="absent"); sys.exit()', 422, "has no adapter_config.json"),
        ('say(error="forbidden"); sys.exit()', 403, "may not read"),
        ('say(error="refused", text="needs a key"); sys.exit()', 422, "needs a key"),
        ('say(error="failed", text="x" * 5000); sys.exit()', 400, "could not be fetched"),
        ("sys.exit()", 400, "ended without a word"),
        ("print('hello'); sys.exit()", 400, "ended without a word"),
        ("print('[]'); sys.exit()", 400, "ended without a word"),
        ("", 422, "has no adapter_config.json"),
    ],
)
async def test_what_went_wrong_is_a_sentence(client, program, before, status, word):
    program(before=before)
    refused = await push(client)
    assert refused.status_code == status and word in refused.json()["error"]["message"], refused.text


async def test_the_real_programs_say_which_package_or_variable_is_missing(client, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert "MLFLOW_TRACKING_URI" in (await push(client)).json()["error"]["message"]
    assert "WANDB_API_KEY" in (await push(client, "wandb-artifact://me/project/tone:v1")).json()["error"]["message"]


async def test_they_are_there_for_tenant_default_alone(connect, config, program):
    program(before=f"open({str(config.data_dir / 'asked')!r}, 'w')")
    async with connect(replace(config, admin_keys=keys_hashed(["run"]))) as client:
        client.headers["authorization"] = "Bearer run"
        body = {"tenant": "acme", "name": "key", "scopes": ["adapters:write"]}
        secret = (await client.post("/v1/keys", json=body)).json()["secret"]
        client.headers["authorization"] = f"Bearer {secret}"
        for source in (SOURCE, "wandb-artifact://me/project/tone:v1"):
            refused = await push(client, source)
            assert refused.status_code == 400 and "tenant default alone" in refused.text
    assert not (config.data_dir / "asked").exists()


def test_the_programs_import_nothing_of_this_package():
    for program, _ in client_process.PROGRAMS.values():
        text = (Path(client_process.__file__).parent / program).read_text()
        assert "serve" not in [line.split()[1].partition(".")[0] for line in text.splitlines() if "import " in line[:7]]
    assert sys.executable == client_process.PYTHON
