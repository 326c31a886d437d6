"""TRL's asynchronous GRPO against a server that takes adapters: its client, its rollouts, its way to publish a policy.

The training itself is a stub: each step's policy is a folder that was trained before.

    python -m tests.support.foreign.trl_training URL TOKENIZER FOLDER SAMPLES POLICY...

The policies are published one after another, each once SAMPLES rollouts of the one before it have come, while rollouts
go on. Prints every rollout, and what TRL counted, as one line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.chat_template_utils import qwen3_template
from trl.experimental.async_grpo import async_grpo_trainer as trl
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop
from trl.experimental.async_grpo.vllm_client import VLLMClient

QUESTIONS = ["What is the capital of France?", "Name a river in Africa.", "Why is the sky blue?"]
NAME, MAX_STALENESS = "trl-policy", 1
SECONDS = 120.0


class StubTrainer:
    """What TRL's `_sync_weight_lora` reads of a trainer, without a model that learns."""

    _sync_weight_lora = trl.AsyncGRPOTrainer._sync_weight_lora

    def __init__(self, client: VLLMClient, folder: Path, worker: Rollouts) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.args = SimpleNamespace(max_staleness=MAX_STALENESS)
        self.model = LlamaForCausalLM(
            LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
        )
        self.vllm_client = client
        self.rollout_worker = worker
        self.model_version = 0
        self._lora_dir, self._lora_name, self._adapter_name = str(folder), NAME, "default"


class Rollouts:
    """TRL's rollout loop in a thread, where TRL itself gives it a process."""

    def __init__(self, url: str, tokenizer: Any) -> None:
        self.samples: queue.Queue = queue.Queue()
        self.metrics: queue.Queue = queue.Queue()
        self.failed, self.reasons = threading.Event(), queue.Queue(1)
        self._version = multiprocessing.Value("i", 0)
        self._loop = _AsyncRolloutLoop(
            model_name="smollm2", lora_name=NAME, vllm_server_url=url, processing_class=tokenizer,
            dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]),
            reward_funcs=[length], eos_token_ids=[tokenizer.eos_token_id], num_generations=2, max_inflight_tasks=4,
            max_tokens=8, temperature=0.1, rollout_buffer=self.samples, model_version_value=self._version,
            heartbeat_value=multiprocessing.Value("d", 0.0), failed_event=self.failed,
            exception_info_queue=self.reasons, metrics_queue=self.metrics,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._loop.run, daemon=True)

    def update_model_version(self, version: int) -> None:
        self._version.value = version

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._loop._loop.call_soon_threadsafe(self._loop._stop_event.set)
        self._thread.join(30)


def length(completions: list[Any], **_: Any) -> list[float]:
    """A reward: any will do."""
    return [float(len(messages[-1]["content"])) for messages in completions]


def publish(_model: Any, _accelerator: Any, _adapter: str, folder: str, policies: list[str] = sys.argv[5:]) -> None:
    """In the place of `save_lora_adapter`: the next policy comes from a folder."""
    shutil.copytree(policies[int(folder.rpartition("-v")[2]) - 1], folder)


def main(url: str, model: str, folder: str, samples: str, *policies: str) -> dict[str, Any]:
    PartialState()  # TRL's logger asks for it
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = qwen3_template  # ChatML, as this model's; TRL knows the templates of some families
    client = VLLMClient(url, server_timeout=10)
    client.wait_for_server_ready()
    worker = Rollouts(url, tokenizer)
    trainer = StubTrainer(client, Path(folder), worker)
    wanted = get_peft_model(trainer.model, LoraConfig(r=8, target_modules=["q_proj"]))
    adapters_alone = trl.select_adapter_sync(client.get_server_info(), wanted, trainer.args)
    trl.save_lora_adapter = publish
    rollouts: list[dict[str, Any]] = []
    for version in range(1, len(policies) + 1):
        trainer._sync_weight_lora(time.time())
        if version == 1:
            worker.start()
        came = 0
        while came < int(samples):
            sample = worker.samples.get(timeout=SECONDS)
            came += sample.model_version == version
            rollouts.append(read(sample))
        if worker.failed.is_set():
            raise RuntimeError(worker.reasons.get(timeout=1))
    worker.stop()
    counted: dict[str, float] = defaultdict(float)
    while not worker.metrics.empty():
        for name, value in worker.metrics.get().items():
            if name.endswith("_total"):
                counted[name] += value
    return {
        "adapters_alone": adapters_alone,
        "max_model_len": client.get_max_model_len(),
        "rollouts": rollouts,
        "counted": counted,
    }


def read(sample: Any) -> dict[str, Any]:
    """A `RolloutSample`, what a training step is computed from."""
    return {
        "version": sample.model_version,
        "text": sample.completion[-1]["content"],
        "tokens": sample.input_ids.tolist(),
        "answered": sample.completion_mask.tolist(),
        "logprobs": sample.old_log_probs.tolist(),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
