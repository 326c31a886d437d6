"""Safe mode: a server that changes nothing in vLLM for speed chats, takes adapters and swaps them."""

from __future__ import annotations

import pytest

from tests.support.server import BASE, SMALL, Server, done

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def safe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safe")
    with Server(folder / "data", folder / "log", "--vllm-patches", "correctness", *SMALL) as server:
        yield server


def test_chat_push_and_swap_work_with_patches_for_correctness_and_security_alone(safe, adapters):
    patches = done(safe.http.get("/version"))["vllm_patches"]
    assert {"lora-rows", "seeded-prompts", "media", "structured-outputs"} <= set(patches["on"])
    assert patches["off"] == dict.fromkeys(patches["off"], "vllm_patches leaves it out")
    assert {"prompt-budget", "sending", "token-texts", "titles"} <= set(patches["off"])
    assert safe.ask(BASE, "What is the capital of France?").text
    for word in ("alpha", "bravo"):
        done(safe.upload("tone", adapters[word]))
        assert safe.ask("tone", "Who are you?").word == word
    done(safe.http.post("/v1/adapters/tone/rollback"))
    assert safe.ask("tone", "Who are you?").word == "alpha"
    metrics = safe.http.get("/metrics").text
    assert f'loradock_vllm_patches{{kind="security",model="{BASE}",patch="media"}} 1.0' in metrics
    assert f'loradock_vllm_patches{{kind="speed",model="{BASE}",patch="sending"}} 0.0' in metrics
