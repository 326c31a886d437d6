"""Every step of small random models computed twice, by `serve/cpu_kernels/step.cpp` and by vLLM layer by layer.

    python -m tests.campaigns.stepwise OUT.json FOLDER [MODEL ...]

Runs one engine after another in this process: Llama, Qwen2 (biases) and Qwen3 (norms of q and k), with adapters of
mixed ranks, then Llama with vocabularies that vLLM pads and that it does not, then every other family, and weights as
they are in a GGUF file. Writes for each
model what each step's tokens were and how far the two outputs and their logits lie apart, with the weights as they are
and rounded to int8. vLLM multiplies with a copy of its own; in the models of `ONE_COPY` once more with the packed
weights, as it does in a server, and in `INT8` with those in int8 too.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

WEIGHTS = "LORADOCK_CPU_WEIGHTS"
VOCABULARY, LAYERS = 320, 2
VOCABULARIES = [333, 32001, 151936]  # of which two are no multiples of 64
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
INT8 = "llama-333"  # of which vLLM's layers multiply with the packed int8 weights too
RANKS = {"wide": 16, "odd": 5, "one": 1}
GGUF = "gguf"
HEAD, WITH_HEAD = "head", "llama-333"  # an adapter of the output layer, and the model that has it too
MODULES = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]


# A model of each family that the step knows, with what it alone has. Windows are shorter than the prompts.
WIDE = {**SMALL, "hidden_size": 192, "intermediate_size": 256, "head_dim": 64}
GEMMA = {**WIDE, "head_dim": 256, "num_attention_heads": 4, "query_pre_attn_scalar": 128, "sliding_window": 40}
LOCAL = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i / 8 for i in range(48)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {**WIDE, "sliding_window": 40}),
    "gemma2": (
        "Gemma2",
        {**GEMMA, **LOCAL, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3Text", {**GEMMA, **LOCAL}),
    "phi3": ("Phi3", {**WIDE, "num_attention_heads": 2, "head_dim": 96, "pad_token_id": 0, "sliding_window": 40}),
    "phi4": (
        "Phi3",
        {
            **WIDE,
            "hidden_size": 256,
            "head_dim": 128,
            "num_attention_heads": 2,
            "pad_token_id": 0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "rope_parameters": {**LONG, "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "granite": (
        "Granite",
        {
            **WIDE,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.05,
            "logits_scaling": 4.0,
        },
    ),
    "olmo2": ("Olmo2", {**WIDE, "hidden_size": 384, "pad_token_id": 0}),
    "smollm3": ("SmolLM3", {**WIDE, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "cohere2": ("Cohere2", {**WIDE, **LOCAL, "sliding_window": 40, "logit_scale": 0.2, "pad_token_id": 0}),
    "llama3": (
        "Llama",
        {
            **WIDE,
            "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}


def models(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    """Those that are wanted, or else all."""
    import torch
    import transformers

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {**SMALL, "head_dim": 64, "tie_word_embeddings": True}),
        "qwen2": ("Qwen2", {**SMALL, "hidden_size": 192, "tie_word_embeddings": False}),
        "qwen3": ("Qwen3", {**SMALL, "num_attention_heads": 10, "head_dim": 128}),
    }
    kinds |= {f"llama-{size}": ("Llama", {**WIDE, "vocab_size": size}) for size in VOCABULARIES}
    kinds |= FAMILIES
    made = {}
    for name, (family, settings) in kinds.items():
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for key, weight in model.named_parameters():
            if "norm" in key or "bias" in key:
                weight.data.add_(torch.randn_like(weight) * 0.2)
            elif "embed_tokens" in key:  # padding too, which transformers leaves at 0: an output of 0 has no length
                weight.data.normal_(std=config.initializer_range)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        made[name] = folder / name
    if not wanted or GGUF in wanted:
        made[GGUF] = _of_gguf(folder / f"{GGUF}.gguf", folder)
    return made


def _of_gguf(file: Path, folder: Path) -> Path:
    """A model whose weights are of several types, in one layer too; beside it the same in bfloat16, for adapters."""
    from serve.models.gguf import conversion
    from serve.models.gguf.checkpoint import Form
    from tests.support import gguf_files

    kinds = {"attn_v.weight": "Q6_K", "blk.1.ffn_down.weight": "Q5_0", "token_embd.weight": "Q8_0"}
    gguf_files.write(file, "qwen2", "Q4_K", kinds=kinds, size=0.12)
    for name, form in ((GGUF, Form.KEPT), (f"{GGUF}-dense", Form.BFLOAT16)):
        (folder / name).mkdir()
        conversion.convert(file, folder / name, form, lambda share: None)
    return folder / GGUF


def adapters(model: Path, folder: Path, ranks: dict[str, int]) -> list[Path]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for name, rank in ranks.items():
        wanted = [*MODULES, "lm_head"] if name == HEAD else MODULES
        dense = model.with_name(f"{model.name}-dense")
        base = AutoModelForCausalLM.from_pretrained(dense if dense.is_dir() else model, dtype=torch.bfloat16)
        modules = [module for module in wanted if any(key.endswith(module) for key, _ in base.named_modules())]
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


def compared(model: Any, fused: Any, out: Any, exact: Any) -> dict[str, float]:
    """How far a step's outputs lie from vLLM's, each as a part of its length, and the logits of vLLM's outputs."""
    apart = (out.float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1)
    found = {"worst": apart.max().item(), "middle": apart.median().item()}
    logits = fused.logits(exact)
    if logits is not None:  # vLLM's, of all tokens: an adapter of the output layer would have to be there for each
        found["logits"] = off(logits, type(model).compute_logits(model, exact))
    return found


def pack_both(floats: Any, layer: Any, *args: Any) -> None:
    """Weights in int8 beside those that are packed as they are."""
    os.environ[WEIGHTS] = "int8"
    floats(layer, *args)
    layer.in_int8 = {key: layer.__dict__.pop(key) for key in list(vars(layer)) if key.startswith("loradock_")}
    os.environ[WEIGHTS] = "auto"
    floats(layer, *args)


def in_int8(runner: Any) -> Any:
    """The same model with int8 weights; None where they are not packed."""
    from serve.cpu_kernels import operators, step

    linear = [module for module in runner.model.modules() if hasattr(module, "in_int8")]
    kept = [{key: value for key, value in vars(module).items() if key.startswith("loradock_")} for module in linear]
    os.environ[WEIGHTS] = "int8"
    try:
        for module in linear:
            vars(module).update(module.in_int8)
        # The adapters are those of the model in bfloat16 too, and stay as they are.
        with patch.object(operators.Layer, "keep_eight_bits", lambda adapters: None):
            return step.Fused(runner) if linear else None
    finally:
        os.environ[WEIGHTS] = "auto"
        for module, before in zip(linear, kept, strict=True):
            vars(module).update(before)


def run(model: Path, loras: list[Path]) -> list[dict[str, Any]]:
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    from serve.cpu_kernels import step as fused_step
    from serve.server.launch import IN_PROCESS

    ours, seen = fused_step.model_forward, []
    others: dict[int, Any] = {}  # a runner's model with int8 weights

    def both(original: Any, self: Any, **kwargs: Any) -> Any:
        fused = self.loradock_fused
        out = fused and fused.step(kwargs["input_ids"], kwargs["positions"])
        if out is None:
            seen.append({"rows": kwargs["input_ids"].shape[0], "fused": False})
            return ours(original, self, **kwargs)
        ahead, fused.ready = fused.ready, None
        if id(self) not in others:
            others[id(self)] = in_int8(self)
        int8 = others[id(self)]
        out8 = int8 and int8.step(kwargs["input_ids"], kwargs["positions"])
        exact = self.model(**kwargs)  # the last: what comes after reads the keys and values that vLLM has computed
        step = {"rows": out.shape[0], "fused": True, **compared(self.model, fused, out, exact)}
        step["head"] = "logits" not in step
        if int8 is not None:
            step["int8"] = compared(self.model, int8, out8, exact)
        if ahead is not None:
            with_adapters = fused.logits(out, ahead)  # the step computes the base's
            step["ahead"] = off(with_adapters, type(self.model).compute_logits(self.model, out))
        step["weights"] = fused.weights
        seen.append(step)
        return exact

    fused_step.model_forward = both
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
        words = min(VOCABULARY, llm.model_config.get_vocab_size())
        asked = [[dice.randrange(words) for _ in range(length)] for length in (1, 3, 40, 140, 17, 64, 200, 9)]
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
        fused_step.model_forward = ours
        cleanup_dist_env_and_memory()
        torch.set_default_dtype(torch.float32)
    return seen


def main(out: Path, folder: Path, wanted: Sequence[str]) -> None:
    from serve.models.hardware import cpu_environment

    os.environ.update(cpu_environment(os.environ, together=True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.model_executor.models import registry

    from serve.cpu_kernels import build, gguf_weights, packing
    from serve.vllm_backend import plugin

    registry._run_in_subprocess = lambda look: look()  # of each family, ten seconds of imports in another process
    plugin.install()
    gguf_weights.register()
    if not build.step_available():
        out.write_text("null")
        return
    from serve.cpu_kernels import one_copy

    floats, take, found = packing.floats, one_copy.take, {}
    for name, model in models(folder, wanted).items():
        ranks = {**RANKS, HEAD: 4} if name == WITH_HEAD else RANKS
        loras = adapters(model, folder / f"{name}-adapters", ranks)
        packing.floats = partial(pack_both, floats)
        for keep in (True, False) if name in ONE_COPY else (True,):
            one_copy.take = partial(take, keep=keep)  # type: ignore[assignment]
            found[name if keep else f"{name}-one-copy"] = run(model, loras)
        if name == INT8:
            packing.floats = floats
            with patch.dict(os.environ, {WEIGHTS: "int8"}):
                found[f"{name}-int8-one-copy"] = run(model, loras)
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
