"""Pushes from MLflow, through its own client from its own tracking server; only where both are installed.

`make sources` installs them in an environment of their own and says so: LORADOCK_TEST_MLFLOW is its Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from serve.adapters.sources import client_process
from tests.support.backend import FakeBackend
from tests.support.server import free_port

PYTHON = os.environ.get("LORADOCK_TEST_MLFLOW", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LORADOCK_TEST_MLFLOW names no Python that has MLflow")

LOG = """
import json, mlflow, sys
folder = sys.argv[1]
with mlflow.start_run() as run:
    mlflow.log_artifacts(folder, "adapter")
client = mlflow.MlflowClient()
client.create_registered_model("tone")
version = client.create_model_version("tone", f"runs:/{run.info.run_id}/adapter", run.info.run_id)
client.set_registered_model_alias("tone", "stable", version.version)
client.create_registered_model("elsewhere")
client.create_model_version("elsewhere", "gs://bucket/tone")
print(json.dumps({"run": run.info.run_id}))
"""


@pytest.fixture(scope="module")
def tracking(tmp_path_factory) -> Iterator[str]:
    """A tracking server that keeps artifacts itself; its URL."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    words = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Its schedulers of jobs are processes of their own: half a minute more until it answers, and until it ends.
    environ = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [PYTHON, "-m", "mlflow", "server", *words]
    server = subprocess.Popen(command, cwd=folder, env=environ, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail("the tracking server did not start")
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def logged(tracking, make_adapter, monkeypatch) -> str:
    """The run that has the adapter, which is a model's version too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    monkeypatch.setattr(client_process, "PYTHON", PYTHON)
    (make_adapter() / "README.md").write_text("---\nauthor: team tone\n---\n")
    done = subprocess.run([PYTHON, "-c", LOG, str(make_adapter())], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["run"]


async def push(client, source, name="tone"):
    return await client.post("/v1/adapters", json={"name": name, "source": source})


async def test_runs_versions_and_aliases_are_fetched_and_nothing_else(connect, config, logged, make_adapter):
    async with connect(config) as client:
        for source, read in (
            (f"mlflow://runs/{logged}/adapter", logged),
            ("mlflow://models/tone/1", "1"),
            ("mlflow://models/tone@stable", "1"),
        ):
            done = await push(client, source, f"by-{len(source)}")
            assert done.status_code == 201, done.text
            provenance = done.json()["provenance"]
            assert (provenance["source_version"], provenance["trained_by"]) == (read, "team tone")
            blob = Path(config.data_dir, "blobs", done.json()["digest"], "adapter_model.safetensors")
            assert blob.read_bytes() == (make_adapter() / blob.name).read_bytes()
        for absent in ("mlflow://models/none/1", "mlflow://models/tone/9", f"mlflow://runs/{'0' * 32}/adapter",
                       f"mlflow://runs/{logged}/none"):  # fmt: skip
            assert (await push(client, absent)).status_code == 422, absent
        elsewhere = await push(client, "mlflow://models/elsewhere/1")
        assert elsewhere.status_code == 400 and "does not read" in elsewhere.text
    async with connect(replace(config, max_upload_bytes=500), FakeBackend(config.model)) as client:
        assert (await push(client, "mlflow://models/tone/1")).status_code == 413
    assert not list((config.data_dir / "quarantine").iterdir())
