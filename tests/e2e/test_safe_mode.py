"""A server that changes in vLLM what a GPU's does alone chats, takes adapters and swaps them.

Safe mode, with nothing for speed, is `tests/serve/vllm_backend/test_served.py`.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from serve.vllm_backend.patches.table import PATCHES
from tests.support.server import BASE, SMALL, Server, descendants, done, patches_of_a_gpu
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
OFF = {patch.name for patch in PATCHES if patch.kind == "speed" and patch.on == "cpu"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    with Server(folder / "data", folder / "log", "--vllm-patches", ",".join(patches_of_a_gpu()), *SMALL) as server:
        yield server


def test_chat_push_swap_and_a_killed_engine_without_what_is_for_a_cpus_speed(server, adapters):
    """Engines are spawned, as on a GPU: there is no fork server."""
    patches = done(server.http.get("/version"))["vllm_patches"]
    assert {"lora-rows", "seeded-prompts", "media", "structured-outputs"} <= set(patches["on"])
    assert patches["off"] == dict.fromkeys(patches["off"], "vllm_patches leaves it out")
    assert set(patches["off"]) <= OFF and not set(patches["on"]) & OFF
    assert {"prompt-budget", "sending", "fork-server"} <= set(patches["off"])
    assert "token-texts" in patches["on"]
    assert server.ask(BASE, "What is the capital of France?").text
    for word in ("alpha", "bravo"):
        done(server.upload("tone", adapters[word]))
        assert server.ask("tone", "Who are you?").word == word
    done(server.http.post("/v1/adapters/tone/rollback"))
    assert server.ask("tone", "Who are you?").word == "alpha"
    metrics = server.http.get("/metrics").text
    assert f'loradock_vllm_patches{{kind="security",model="{BASE}",patch="media"}} 1.0' in metrics
    assert f'loradock_vllm_patches{{kind="speed",model="{BASE}",patch="sending"}} 0.0' in metrics
    (engine,) = engines(server)
    os.kill(engine, signal.SIGKILL)
    assert eventually(lambda: server.engine()["restarts"] == 1 and server.engine()["phase"] == "ready", 300)
    assert server.ask("tone", "Who are you?").word == "alpha", "the adapter is there again"


def engines(server: Server) -> list[int]:
    """The engine's process, by its title."""
    found = []
    for pid in sorted(descendants(server.process.pid)):
        with suppress(OSError):
            if b"loradock: engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
