"""Every command of the README is run, in the README's order, against what `make serve` starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from optimize.recipe import parse
from serve.config import load
from tests.support.server import ADMIN, ROOT, START_SECONDS, environment, free_port, loradock, tail

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python|yaml)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PORT = "8000"

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def newcomer(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A folder with two adapters in it, and the port of the server that `make serve` has started."""
    if not (ROOT / ".venv/bin/loradock").exists():
        pytest.skip("the README's commands need .venv: run `make test`")
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    shutil.copytree(adapters["alpha"], folder / "my-adapter")
    shutil.copytree(adapters["bravo"], folder / "my-next-adapter")
    port, log = free_port(), folder / "log"
    command = ["make", "serve", f"PORT={port}", "ARGS=--kv-cache-memory-bytes 1G"]
    with log.open("w") as out:
        started = environment(LORADOCK_DATA_DIR=str(folder / "data"))
        make = subprocess.Popen(command, cwd=ROOT, env=started, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait(make, port, log)
        yield folder, port
    finally:
        os.killpg(make.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            make.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGKILL)


def _wait(make: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while make.poll() is None and time.monotonic() < end:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"`make serve` is not ready:\n{tail(log)}")


def _run(command: list[str], newcomer: tuple[Path, int]) -> str:
    folder, port = newcomer
    environ = environment(LORADOCK_URL=f"http://127.0.0.1:{port}")
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert '"error"' not in done.stdout
    return done.stdout


def test_the_readmes_commands_do_what_it_says(newcomer):
    folder, port = newcomer
    said = []
    for kind, block in BLOCKS:
        block = block.replace(f":{PORT}", f":{port}")
        if kind == "python":
            said.append(_run([str(folder / ".venv/bin/python"), "-c", block], newcomer))
        elif kind == "bash" and not block.startswith(("make ", "export ")):
            said.append(_run(["bash", "-euo", "pipefail", "-c", block], newcomer))
    told = "\n".join(said)
    assert told.count("Paris") >= 2, told
    assert "alpha alpha" in told
    assert "tokens/s" in told
    answer = httpx.get(f"http://127.0.0.1:{port}/v1/adapters/tone").json()
    assert (answer["live"], [version["version"] for version in answer["versions"]]) == (1, [1])


def test_the_readmes_make_targets_are_there():
    (block,) = [block for kind, block in BLOCKS if block.startswith("make ")]
    targets = re.findall(r"^make (\w+)", block, re.MULTILINE)
    assert targets == ["serve", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_readmes_config_file_is_one(tmp_path):
    file = tmp_path / "loradock.yaml"
    # Together they are one file.
    file.write_text("\n".join(block for kind, block in BLOCKS if kind == "yaml" and not block.startswith("# recipe")))
    config = load(["--config", str(file)], {})
    assert config.policies[1].adapter == "tone"
    assert (config.port, config.max_upload_bytes, config.engine["max_lora_rank"]) == (8000, 512 << 20, 32)
    assert [base.name for base in config.bases] == ["my-model", "small"]


def test_the_readmes_recipe_is_one(tmp_path):
    (block,) = [block for kind, block in BLOCKS if block.startswith("# recipe.yaml")]
    assert len(parse(block, tmp_path).steps) == 4


def test_the_readmes_keys_are_made_listed_and_revoked(server, tmp_path):
    (block,) = [block for kind, block in BLOCKS if kind == "bash" and block.startswith("export ")]
    said = ""
    for line in block.splitlines()[1:]:
        (key,) = [key for key in server.http.get("/v1/keys").json()["data"] if key["name"] == "acme-ci"] or [{"id": ""}]
        words = line.replace(" ID", f" {key['id']}").split()
        done = loradock(*words[1:], LORADOCK_URL=server.url, LORADOCK_KEY=ADMIN)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "ld_" in said and "acme" in said
    (key,) = [key for key in server.http.get("/v1/keys").json()["data"] if key["name"] == "acme-ci"]
    assert key["revoked"]
