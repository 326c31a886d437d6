"""Pushes from Weights & Biases, through its own client from a service in small; only where the client is installed.

`make sources` installs it in an environment of its own and says so: LORADOCK_TEST_WANDB is its Python. Manifest and
digests are those that the client makes of a folder.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from serve.adapters.sources import client_process
from tests.support.backend import FakeBackend
from tests.support.waiting import eventually
from tests.support.wandb_service import ENTITY, PROJECT, WandbService, running

PYTHON = os.environ.get("LORADOCK_TEST_WANDB", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LORADOCK_TEST_WANDB names no Python that has wandb")

KEY = "0123456789abcdef" * 2 + "01234567"
LOG = """
import json, sys, wandb
artifact = wandb.Artifact("tone", "model")
artifact.add_dir(sys.argv[1])
if len(sys.argv) > 2:
    artifact.add_reference(sys.argv[2], name="adapter_model.safetensors", checksum=False)
artifact.finalize()
print(json.dumps(artifact.manifest.to_manifest_json()))
"""


@pytest.fixture
def service(monkeypatch, tmp_path) -> Iterator[WandbService]:
    with running(WandbService(KEY)) as service:
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(client_process, "PYTHON", PYTHON)
        yield service


def logged(service: WandbService, folder: Path, cache: Path, version: int = 0, reference: str = "") -> None:
    environ = {**os.environ, "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    environ |= {f"WANDB_{name}": str(cache) for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR")}
    words = [PYTHON, "-c", LOG, str(folder), *([reference] if reference else [])]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    manifest = json.loads(done.stdout.splitlines()[-1])
    files = {
        base64.b64decode(entry["digest"]).hex(): (folder / name).read_bytes()
        for name, entry in manifest["contents"].items()
        if "ref" not in entry
    }
    service.log("tone", version, manifest, files)


def services() -> list[str]:
    """What of wandb's own service runs: each client starts one, in a session of its own."""
    running = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            running += [process.name] if words[0].endswith(b"wandb-core") else []
    return running


async def push(client, source, name="tone"):
    return await client.post("/v1/adapters", json={"name": name, "source": source})


async def test_versions_and_aliases_are_fetched_and_nothing_else(connect, config, service, make_adapter, tmp_path):
    (make_adapter() / "README.md").write_text("---\nauthor: team tone\n---\n")
    logged(service, make_adapter(), tmp_path / "cache", 3)
    at = f"wandb-artifact://{ENTITY}/{PROJECT}"
    async with connect(config) as client:
        for alias in ("v3", "latest"):
            done = await push(client, f"{at}/tone:{alias}", f"by-{alias}")
            assert done.status_code == 201, (done.text, service.queries, service.asked)
            provenance = done.json()["provenance"]
            assert (provenance["source_version"], provenance["trained_by"]) == ("v3", "team tone")
            blob = Path(config.data_dir, "blobs", done.json()["digest"], "adapter_model.safetensors")
            assert blob.read_bytes() == (make_adapter() / blob.name).read_bytes()
        for absent in (f"{at}/none:v0", f"{at}/tone:v9", f"wandb-artifact://{ENTITY}/none/tone:v3"):
            refused = await push(client, absent)
            assert refused.status_code == 422, (absent, refused.text)
    async with connect(replace(config, max_upload_bytes=500), FakeBackend(config.model)) as client:
        assert (await push(client, f"{at}/tone:v3")).status_code == 413
    assert not list((config.data_dir / "quarantine").iterdir())
    assert eventually(lambda: not services()), "what the client starts ends with it"


async def test_a_key_that_is_not_known_and_a_reference_are_a_sentence(
    client, service, make_adapter, tmp_path, monkeypatch
):
    folder = make_adapter()
    (folder / "adapter_model.safetensors").unlink()
    logged(service, folder, tmp_path / "cache", reference="https://files.example.org/adapter_model.safetensors")
    source = f"wandb-artifact://{ENTITY}/{PROJECT}/tone:v0"
    refused = await push(client, source)
    assert refused.status_code == 422 and "log the file itself" in refused.text, refused.text
    monkeypatch.setenv("WANDB_API_KEY", KEY[::-1])
    stranger = await push(client, source)
    assert stranger.status_code == 403 and "may not read" in stranger.text, stranger.text
