"""Every step of small random models computed twice, by `serve/cpu_kernels/step.cpp` and by vLLM layer by layer.

    python -m tests.campaigns.stepwise OUT.json FOLDER

Runs one engine after another in this process: Llama, Qwen2 (biases) and Qwen3 (norms of q and k), with adapters of
mixed ranks, then Llama with vocabularies that vLLM pads and that it does not. Writes for each model what each step's
tokens were and how far the two outputs and their logits lie apart. LORADOCK_CPU_WEIGHTS=int8 makes the weights int8.
vLLM multiplies with a copy of its own; in the models of `ONE_COPY` once more with the packed weights, as it does in a
server.
"""

from __future__ import annotations

import json
import os
import random
import sys
from functools import wraps
from pathlib import Path
from typing import Any

VOCABULARY, LAYERS = 320, 2
VOCABULARIES = [320, 333, 32001, 49152, 151936]  # 333 and 32001 are no multiples of 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
ONE_COPY = ("llama", "qwen2", "llama-333")
RANKS = {"wide": 16, "odd": 5, "one": 1}
HEAD, WITH_HEAD = "head", "llama-333"  # an adapter of the output layer, and the model that has it too
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def models(folder: Path) -> dict[str, Path]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    made = {}
    kinds: list[tuple[str, Any, Any]] = [
        ("llama", LlamaConfig(**SMALL, head_dim=64, tie_word_embeddings=True), LlamaForCausalLM),
        ("qwen2", Qwen2Config(**{**SMALL, "hidden_size": 192}, tie_word_embeddings=False), Qwen2ForCausalLM),
        ("qwen3", Qwen3Config(**{**SMALL, "num_attention_heads": 10}, head_dim=128), Qwen3ForCausalLM),
    ]
    if os.environ.get("LORADOCK_CPU_WEIGHTS") == "int8":  # groups of 64 inputs do not divide those
        kinds.clear()
    wide = {**SMALL, "hidden_size": 192, "intermediate_size": 256, "head_dim": 64}
    for size in VOCABULARIES:
        kinds.append((f"llama-{size}", LlamaConfig(**{**wide, "vocab_size": size}), LlamaForCausalLM))
    for name, config, kind in kinds:
        model = kind(config)
        for key, weight in model.named_parameters():
            if "norm" in key or "bias" in key:
                weight.data.add_(torch.randn_like(weight) * 0.2)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        made[name] = folder / name
    return made


def adapters(model: Path, folder: Path, ranks: dict[str, int]) -> list[Path]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for name, rank in ranks.items():
        modules = [*MODULES, "lm_head"] if name == HEAD else MODULES
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        tuned = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules))
        for key, weight in tuned.named_parameters():
            if "lora_" in key:
                weight.data.normal_(std=0.08)
        tuned.save_pretrained(folder / name)
        made.append(folder / name)
    return made


def off(logits: Any, exact: Any) -> float:
    """How far the logits lie from the exact ones, as a part of the largest of them."""
    assert logits.shape == exact.shape
    return float((logits - exact.float()).abs().max() / exact.float().abs().max())


def run(model: Path, loras: list[Path]) -> list[dict[str, Any]]:
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from serve.server.launch import IN_PROCESS

    ours, seen = CPUModelRunner._model_forward, []

    @wraps(ours)  # so that it is taken for ours when vLLM loads its plugins
    def both(self: Any, **kwargs: Any) -> Any:
        fused = self.loradock_fused
        out = fused and fused.step(kwargs["input_ids"], kwargs["positions"])
        if out is None:
            seen.append({"rows": kwargs["input_ids"].shape[0], "fused": False})
            return ours(self, **kwargs)
        ahead, fused.ready = fused.ready, None
        exact = self.model(**kwargs)
        apart = (out.float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1)
        step = {"rows": out.shape[0], "fused": True, "worst": apart.max().item(), "middle": apart.median().item()}
        logits = fused.logits(exact)
        step["head"] = logits is None
        if logits is not None:  # vLLM's, of all tokens: an adapter of the output layer would have to be there for each
            step["logits"] = off(logits, type(self.model).compute_logits(self.model, exact))
        if ahead is not None:
            step["ahead"] = off(ahead, type(self.model).compute_logits(self.model, out))
        step["weights"] = fused.weights
        seen.append(step)
        return exact

    CPUModelRunner._model_forward = both
    llm: Any = None
    try:
        llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_batched_tokens=96,
            max_num_seqs=16,
            kv_cache_memory_bytes=1 << 26,
            enable_lora=True,
            max_loras=4,
            max_lora_rank=16,
            distributed_executor_backend=IN_PROCESS,
        )
        dice = random.Random(0)
        asked = [[dice.randrange(VOCABULARY) for _ in range(length)] for length in (1, 3, 40, 140, 17, 64, 200, 9)]
        requests = [None, *(LoRARequest(path.name, number, str(path)) for number, path in enumerate(loras, 1))]
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)

        def ask(count: int, shift: int) -> None:
            prompts = [TokensPrompt(prompt_token_ids=one) for one in asked[:count]]
            chosen = [requests[(number + shift) % len(requests)] for number in range(count)]
            llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)

        ask(1, 0)  # alone, without an adapter and with each
        ask(1, 1)
        ask(1, 2)
        if len(requests) > len(RANKS) + 1:
            ask(1, len(requests) - 1)
            ask(3, 0)  # while an adapter of the output layer holds a slot
        ask(len(asked), 0)  # mixed, and longer than a step takes
    finally:
        llm = None
        CPUModelRunner._model_forward = ours
        cleanup_dist_env_and_memory()
        torch.set_default_dtype(torch.float32)
    return seen


def main(out: Path, folder: Path) -> None:
    from serve.models.hardware import cpu_environment

    os.environ.update(cpu_environment(os.environ, together=True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from serve.cpu_kernels import build, install

    install.install()  # vLLM would do so itself, after `run` has put its own forward pass in place
    if not build.step_available():
        out.write_text("null")
        return
    from serve.cpu_kernels import step

    found = {}
    for name, model in models(folder).items():
        ranks = {**RANKS, HEAD: 4} if name == WITH_HEAD else RANKS
        loras = adapters(model, folder / f"{name}-adapters", ranks)
        for keep in (True, False) if name in ONE_COPY else (True,):
            step._keeps_vllms = lambda _, keep=keep: keep  # type: ignore[assignment,misc]
            found[name if keep else f"{name}-one-copy"] = run(model, loras)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
