"""Programs that were written for vLLM's runtime LoRA API, as the requests that they send.

Each sequence is taken from the client's source, which is named with its version. tests/e2e/test_foreign_clients.py has
the real engine, and the programs themselves where they are Python.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support import tiny
from tests.support.vllm_clients import LOAD, UNLOAD, ProductionStack, aibrix_loads, aibrix_unloads, kubeai_asks
from tests.support.waiting import settled


@pytest.fixture
async def vllm(connect, config, tmp_path):
    """A server without keys, as these clients send none, that takes folders below the test's own."""
    async with connect(replace(config, source_roots=(str(tmp_path),))) as client:
        yield client


class TrlClient:
    """trl 1.16.0: trl/experimental/async_grpo/vllm_client.py `VLLMClient`, and its calls in async_grpo_trainer.py."""

    def __init__(self, http) -> None:
        self.http = http

    async def get_server_info(self):
        response = await self.http.get("/server_info", params={"config_format": "json"})
        response.raise_for_status()
        return response.json()["vllm_config"]

    async def load_lora_adapter(self, lora_name, lora_path):
        response = await self.http.post(
            "/v1/load_lora_adapter", json={"lora_name": lora_name, "lora_path": lora_path, "load_inplace": False}
        )
        if response.status_code != 200:
            raise Exception(f"Request failed: {response.status_code}, {response.text}")

    async def unload_lora_adapter(self, lora_name):
        await self.http.post("/v1/unload_lora_adapter", json={"lora_name": lora_name})

    async def pause(self):
        assert (await self.http.post("/pause", params={"mode": "keep"})).status_code == 200

    async def resume(self):
        assert (await self.http.post("/resume")).status_code == 200

    async def sync(self, version, adapter_dir, max_staleness):
        """`_sync_weight_lora`: the new policy comes, then the one that nobody names any more goes."""
        await self.pause()
        await self.load_lora_adapter(f"trl-policy-v{version}", str(adapter_dir))
        await self.resume()
        stale_version = version - (max_staleness + 1)
        if stale_version > 0:
            await self.unload_lora_adapter(f"trl-policy-v{stale_version}")

    async def generate(self, version, prompt_ids):
        """`_generate_one_turn` in async_rollout_worker.py."""
        payload = {
            "model": f"trl-policy-v{version}", "prompt": prompt_ids, "max_tokens": 32, "temperature": 1.0,
            "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "n": 1, "return_token_ids": True, "logprobs": 0,
            "seed": 2**63 - 1,
        }  # fmt: skip
        return await self.http.post("/v1/completions", json=payload)


async def test_trls_asynchronous_grpo_trains_with_a_new_name_at_each_step(vllm, backend, make_adapter):
    trl, max_staleness = TrlClient(vllm), 1
    assert (await vllm.get("/health")).status_code == 200
    info = await trl.get_server_info()
    assert info["lora_config"]["max_lora_rank"] >= 2 and info["parallel_config"]["data_parallel_size"] == 1
    assert info["lora_config"]["max_loras"] == backend.slots
    assert (await vllm.get("/v1/models")).json()["data"][0]["max_model_len"] == backend.max_model_len
    # Before the first step the policy is the base: PEFT begins with lora_B = 0.
    backend.effects["trl-policy-v1"] = 0.0
    policies = [tiny.untrained(make_adapter(1)), *(make_adapter(step) for step in range(2, 6))]
    for version, policy in enumerate(policies, 1):
        await trl.sync(version, policy, max_staleness)
        answer = await trl.generate(version, [1, 2, 3])
        assert (answer.status_code, answer.headers["x-loradock-version"]) == (200, f"trl-policy-v{version}@v1")
        named = [n for n in range(1, version + 1) if (await trl.generate(n, [1])).status_code == 200]
        assert named == list(range(max(1, version - max_staleness), version + 1))
    assert [body["return_token_ids"] for body in backend.bodies] == [True] * len(backend.bodies)
    # A second run counts from 1 again, whatever the first one left behind.
    await trl.sync(5, make_adapter(9), max_staleness)
    assert (await trl.generate(5, [1])).headers["x-loradock-version"] == "trl-policy-v5@v2"


async def test_a_pause_that_would_end_other_clients_answers_is_refused(vllm):
    for mode in ("abort", "wait"):
        refused = await vllm.post("/pause", params={"mode": mode})
        assert refused.status_code == 400 and "other clients" in refused.json()["error"]["message"]


async def test_aibrix_asks_what_is_there_and_loads_what_is_missing(vllm, make_adapter):
    path = str(make_adapter())
    assert await aibrix_loads(vllm, "tone", path)
    assert not await aibrix_loads(vllm, "tone", path)
    await aibrix_unloads(vllm, "tone")
    assert await aibrix_loads(vllm, "tone", path)


async def test_production_stack_reads_its_adapters_from_the_list_of_models(vllm, make_adapter):
    stack = ProductionStack(vllm)
    assert await stack.registrations() == set()
    # Each reconciliation may load what is there already.
    for _ in range(2):
        await stack.loads("tone", str(make_adapter()))
    assert "tone" in await stack.registrations()
    await stack.unloads("tone")
    assert "tone" not in await stack.registrations()


async def test_kubeai_loads_and_unloads_by_status_alone(vllm, make_adapter):
    assert await kubeai_asks(vllm, LOAD, lora_name="tone", lora_path=str(make_adapter()))
    assert await kubeai_asks(vllm, UNLOAD, lora_name="tone")
    assert not await kubeai_asks(vllm, UNLOAD, lora_name="tone")


async def test_a_trainer_loads_one_name_in_place_after_each_step(vllm, backend, make_adapter):
    """vLLM 0.32: docs/features/lora.md, "In-Place LoRA Reloading", which is meant for reinforcement learning."""
    for step in range(3):
        body = {"lora_name": "policy", "lora_path": str(make_adapter(step)), "load_inplace": True}
        assert (await vllm.post("/v1/load_lora_adapter", json=body)).status_code == 200
        answer = await vllm.post("/v1/completions", json={"model": "policy", "prompt": [1]})
        assert answer.headers["x-loradock-version"] == f"policy@v{step + 1}"
    assert await settled(lambda: len(backend.held) == 1), "the versions before it stay in the engine's memory"
