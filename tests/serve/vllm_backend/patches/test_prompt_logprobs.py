"""Log-probabilities of a prompt come from its request's own adapter, whoever runs beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

if not current_platform.is_cpu():
    pytest.skip("vLLM's LoRA operations for a CPU", allow_module_level=True)

from serve.cpu_kernels import operators, punica
from serve.vllm_backend.patches import prompt_logprobs
from tests.support import vllm_worker

HIDDEN, VOCABULARY, SLOTS = 64, 320, 2
TENANT, RIVAL = 7, 8  # adapters of lm_head
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module", autouse=True)
def one_worker(tmp_path_factory):
    with vllm_worker.one_worker(tmp_path_factory.mktemp("init"), "prompt-logprobs"):
        yield


class Model(torch.nn.Module):
    """An output layer with two adapters, and its own manager of them: of vLLM's, what is used of it."""

    def __init__(self, kernels: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.bfloat16)
        self.head.weight.data.normal_(std=0.1)
        self.head.quant_method.process_weights_after_loading(self.head)
        self.logits = LogitsProcessorWithLoRA(
            LogitsProcessor(VOCABULARY), HIDDEN, torch.bfloat16, torch.device("cpu"), None
        )
        config = LoRAConfig(max_lora_rank=8, max_loras=SLOTS, lora_dtype=torch.bfloat16)
        self.logits.create_lora_weights(SLOTS, config)
        self.wrapper = (PunicaWrapperCPU if kernels == "off" else punica.Punica)(64, 64, "cpu")
        self.logits.set_mapping(self.wrapper)
        self.modules_with_adapters = {"logits": self.logits}
        self.lora_slots, self.lora_index_to_id = SLOTS, [TENANT, RIVAL]
        self._last_mapping = self._layers = None
        self.lora_manager = self
        if kernels != "off":
            manager = SimpleNamespace(modules=self.modules_with_adapters, lora_slots=SLOTS, model=self)
            punica._adopt(manager)
            self._layers = manager.loradock_layers
        for slot in range(SLOTS):
            a, b = torch.randn(8, HIDDEN).mul(0.3).bfloat16(), torch.randn(VOCABULARY, 8).bfloat16()
            self.logits.set_lora(slot, a, b)
            if self._layers:
                operators.load(self._layers, slot)

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        self._last_mapping = mapping
        self.wrapper.update_metadata(mapping, self.lora_index_to_id, SLOTS + 1, VOCABULARY)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.logits._get_logits(hidden_states, self.head)


def runner(model: Model, requests: dict[str, tuple[int, int]], asked: list[str]) -> SimpleNamespace:
    """A step of these requests, each (adapter, tokens of its prompt); `asked` want log-probabilities of the prompt."""
    starts = np.cumsum([0, *(tokens for _, tokens in requests.values())])
    adapters = [adapter for adapter, _ in requests.values()]
    of_tokens = np.repeat(adapters, np.diff(starts))
    model.set_adapter_mapping(LoRAMapping(tuple(of_tokens), tuple(adapters), is_prefill=True))
    return SimpleNamespace(
        num_prompt_logprobs=dict.fromkeys(asked, 3),
        requests={
            name: SimpleNamespace(
                prompt_token_ids=[(3 * i + 1) % VOCABULARY for i in range(tokens)],
                in_progress_prompt_logprobs_cpu=None,
                num_computed_tokens=0,
            )
            for name, (_, tokens) in requests.items()
        },
        device=torch.device("cpu"),
        lora_config=object(),
        lora_manager=SimpleNamespace(_adapter_manager=model),
        input_batch=SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(requests)}),
        query_start_loc=SimpleNamespace(np=starts),
        model=model,
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        sampler=Sampler(),
        _sync_device=lambda: None,
    )


# Beside one other request a prompt of three tokens has as many rows as there are requests.
STEPS = {
    "as many rows as requests": {"base": (0, 3), "tenant": (TENANT, 1)},
    "other numbers of rows": {"tenant": (TENANT, 1), "base": (0, 13), "own": (RIVAL, 6), "more": (0, 2)},
}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS.keys())
def test_every_row_of_a_prompt_is_computed_with_its_requests_own_adapter(kernels, requests):
    model = Model(kernels)
    hidden = torch.randn(sum(tokens for _, tokens in requests.values()), HIDDEN).bfloat16()
    asked = [name for name, (_, tokens) in requests.items() if tokens > 1]
    step = runner(model, requests, asked)
    together = GPUModelRunner._get_prompt_logprobs_dict(step, hidden, {n: t for n, (_, t) in requests.items()})
    assert set(together) == set(asked) and not step.num_prompt_logprobs
    assert len(model._last_mapping.prompt_mapping) == len(requests), "the next step finds it as it was"
    assert "compute_logits" not in vars(model)
    first = 0
    for name, (adapter, tokens) in requests.items():
        rows, first = hidden[first : first + tokens], first + tokens
        if name not in asked:
            continue
        # The same rows alone, arranged by hand.
        count = tokens - 1
        model.set_adapter_mapping(LoRAMapping((adapter,) * count, (adapter,) * count, is_prefill=True))
        if adapter:
            exact = model.compute_logits(rows[:count])
        else:
            with torch.no_grad():
                exact = model.logits.base_layer._apply_head(model.head, rows[:count], None)[:, :VOCABULARY]
        exact = exact.float().log_softmax(-1)
        got = together[name]
        ids, values = got.logprob_token_ids[:, 0].long(), got.logprobs[:, 0]
        assert torch.allclose(values, exact.gather(1, ids[:, None])[:, 0], atol=0.02)


def test_vllms_second_model_runner_gets_the_same():
    model = Model("off")
    hidden = torch.randn(5, HIDDEN).bfloat16()
    step = LoRAMapping((0, 0, TENANT, RIVAL, 0), (0, TENANT, RIVAL, 0), is_prefill=True)
    model.set_adapter_mapping(step)
    seen = []

    def original(worker, logits_fn, hidden_states, *others):
        logits_fn(hidden_states[:3])
        seen.append(model._last_mapping.prompt_mapping)
        logits_fn(hidden_states[3:])
        seen.append(model._last_mapping.prompt_mapping)
        return others

    assert prompt_logprobs.compute_prompt_logprobs(original, None, model.compute_logits, hidden, 1, 2) == (1, 2)
    assert seen == [(0, 0, TENANT), (RIVAL, 0)] and model._last_mapping == step
    with pytest.raises(RuntimeError, match="rows that are not the step's"):
        prompt_logprobs.compute_prompt_logprobs(original, None, model.compute_logits, hidden.repeat(2, 1), 1)


@pytest.mark.engine
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_busy_engine_tells_of_prompts_what_a_quiet_one_does(kernels, tmp_path):
    """Streams of two adapters of lm_head, and prompts in pieces of the base and of both."""
    command = [sys.executable, "-m", "tests.campaigns.prompt_rows", str(tmp_path / "out.json"), str(tmp_path)]
    environ = {**os.environ, "LORADOCK_LORA_KERNELS": kernels, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["apart"]) >= 12 and found["adapters apart"] > 0.5
    # Other sizes of a batch round other ways.
    assert max(found["apart"].values()) < 0.1
