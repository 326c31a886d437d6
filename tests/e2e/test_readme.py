"""Every command of README and docs is run, page by page, against what `make serve` starts."""

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

from tests.support.pages import pages
from tests.support.server import ADMIN, ROOT, START_SECONDS, environment, free_port, loradock, tail

PAGES = {page.name: page for page in pages()}
PORT = "8000"
# The README trains its next version for minutes (`make first-hour` does); here it is pushed.
TRAINED = {"README.md": ("loradock adapters canary", "loradock adapters push tone ./my-next-adapter --no-promote\n")}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def newcomer(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A folder with two adapters in it, and the port of the server that `make serve` has started."""
    if not (ROOT / ".venv/bin/loradock").exists():
        pytest.skip("the README's commands need .venv: run `make test`")
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    shutil.copytree(adapters["alpha"], folder / "my-adapter")
    shutil.copytree(adapters["alpha"], folder / "serve/cli/demo/good")
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


def typed(page: str, newcomer: tuple[Path, int]) -> str:
    """What a page's commands print when they are typed one after another; each must succeed."""
    folder, port = newcomer
    # Its first line on the page is `source .venv/bin/activate`; a reader of the other pages has done that.
    script = "source .venv/bin/activate\n" + PAGES[page].script.replace(f":{PORT}", f":{port}")
    before, push = TRAINED.get(page, ("", ""))
    script = script.replace(before, push + before, 1)
    environ = environment(LORADOCK_URL=f"http://127.0.0.1:{port}")
    command = ["bash", "-xeuo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{page}\n{done.stdout}\n{done.stderr}"
    assert '"error":' not in done.stdout, f"{page}\n{done.stdout}"
    return done.stdout


def versions(port: int) -> tuple[int, list[int]]:
    """The live version of `tone`, and all of them."""
    answer = httpx.get(f"http://127.0.0.1:{port}/v1/adapters/tone", timeout=60).json()
    return answer["live"], [version["version"] for version in answer["versions"]]


@pytest.fixture(scope="module")
def readme(newcomer: tuple[Path, int]) -> str:
    """What the README's commands print."""
    return typed("README.md", newcomer)


def test_the_readmes_commands_chat_push_promote_and_roll_back(readme, newcomer):
    assert "Paris" in readme
    assert "alpha alpha" in readme and "tone@v2 answers 10% of the requests" in readme
    assert versions(newcomer[1]) == (1, [1, 2])


def test_the_quickstarts_and_the_adapters_pages_commands_do_what_they_say(readme, newcomer):
    printed = typed("docs/quickstart.md", newcomer)
    assert printed.count("Paris") >= 2, printed
    assert "alpha alpha" in printed and "tokens/s" in printed
    assert "bravo" in typed("docs/adapters.md", newcomer)
    assert versions(newcomer[1]) == (1, [1])


@pytest.mark.parametrize("page", [page for page in list(PAGES)[3:] if PAGES[page].script])
def test_the_commands_of_the_other_pages_succeed(readme, newcomer, page):
    typed(page, newcomer)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_make_targets_are_there(page):
    (block,) = [block for block in PAGES[page].of("bash") if block.startswith("make ")]
    targets = re.findall(r"^make (\w+)", block, re.MULTILINE)
    assert targets == ["serve", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_keys_are_made_listed_and_revoked_as_the_page_on_tenants_says(server, tmp_path):
    (block,) = [block for block in PAGES["docs/tenants.md"].of("sh") if block.startswith("export ")]
    printed = ""
    for line in block.splitlines()[1:]:
        (key,) = [key for key in server.http.get("/v1/keys").json()["data"] if key["name"] == "acme-ci"] or [{"id": ""}]
        words = line.replace(" ID", f" {key['id']}").split()
        done = loradock(*words[1:], LORADOCK_URL=server.url, LORADOCK_KEY=ADMIN)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert "ld_" in printed and "acme" in printed
    (key,) = [key for key in server.http.get("/v1/keys").json()["data"] if key["name"] == "acme-ci"]
    assert key["revoked"]
