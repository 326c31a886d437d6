"""vLLM's own sizes of well-known models, in a process of its own: its layers and its slots on torch's meta device, its
cut of the KV cache, and its configuration for an H100 that is not there. Prints JSON.

    python -m tests.support.vllm_sizes sizes|platform
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from serve.models.dimensions import KNOWN, Dimensions
from tests.support.nvml import Device

RANK, SLOTS = 16, 8
AVAILABLE = 10 << 30  # for the KV cache on each GPU
CARDS = (("h100", 1), ("h100", 2), ("a10", 1), ("a100-80", 1))
DEVICES = {
    "h100": Device("NVIDIA H100 80GB HBM3", 79.1, 79, "GPU-a"),
    "a10": Device("NVIDIA A10", 22, 22, "GPU-b", (8, 6)),
    "a100-80": Device("NVIDIA A100-SXM4-80GB", 79.1, 79, "GPU-c", (8, 0)),
}
MODELS = {
    "Llama-3.1-8B-Instruct": "llama",
    "Qwen3-14B": "qwen3",
    "Llama-3.3-70B-Instruct": "llama",
    "Mixtral-8x7B-Instruct-v0.1": "mixtral",
}


def folder(name: str) -> str:
    """A checkpoint's directory with its config.json alone."""
    d: Dimensions = KNOWN[name]
    config: dict[str, Any] = {
        "architectures": [d.architecture],
        "model_type": MODELS[name],
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head,
        "vocab_size": d.vocabulary,
        "max_position_embeddings": d.context,
        "tie_word_embeddings": d.tied,
        "torch_dtype": "bfloat16",
    }
    if d.experts:
        config |= {"num_local_experts": d.experts, "num_experts_per_tok": 2}
    made = Path(tempfile.mkdtemp()) / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    return str(made)


def engine_config(name: str, **options: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    args = AsyncEngineArgs(
        model=folder(name),
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=SLOTS,
        max_lora_rank=RANK,
        max_cpu_loras=SLOTS,
        **options,
    )
    return args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def sizes() -> Iterator[dict[str, Any]]:
    """Of each model, cut over 1, 2, 4 and 8 GPUs: bytes on each of them, and tokens in the KV cache."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state

    for number, name in enumerate(MODELS):
        options = {"kv_cache_memory_bytes": 1 << 30, "distributed_executor_backend": "uni", "max_model_len": 8192}
        config = engine_config(name, **options)
        config.cache_config.kv_cache_layout = "NHD"  # the engine's process chooses one, of the same size
        with set_current_vllm_config(config):
            if not number:
                init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="gloo")
                initialize_model_parallel(1, 1, backend="gloo")
                parallel_state._EP = parallel_state._TP
            for gpus in (1, 2, 4, 8):
                # Layers read how many there are, and nothing is sent.
                parallel_state._TP.world_size = config.parallel_config.tensor_parallel_size = gpus
                config.compilation_config.static_forward_context.clear()
                yield {"model": name, "gpus": gpus, **_sizes(config, KNOWN[name], gpus)}


def _sizes(config: Any, d: Dimensions, gpus: int) -> dict[str, int]:
    import torch
    from vllm.lora.model_manager import create_lora_manager
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        model = initialize_model(vllm_config=config)
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    (cut,) = get_kv_cache_configs(config, [specs], [AVAILABLE])
    # On a CPU vLLM puts no adapters on experts: their slots are made by themselves, below.
    experts = mock.patch("vllm.lora.layers.fused_moe.FusedMoEWithLoRA.can_replace_layer", lambda *_, **__: False)
    with experts, torch.device("meta"):
        manager = create_lora_manager(
            model, SLOTS, 2048, d.vocabulary, config.lora_config, device=torch.device("meta"), vllm_config=config
        )
    slots = sum(_held(module, "lora") for module in manager.modules.values())
    slots += d.layers * _expert_slots(config.lora_config, d, gpus) if d.experts else 0
    block = next(iter(specs.values())).block_size
    return {"weights": weights, "tokens": cut.num_blocks * block, "slot": slots // SLOTS}


def _held(module: Any, prefix: str) -> int:
    held = [getattr(module, f"{prefix}_{side}_stacked", ()) for side in "ab"]
    tensors = [each for part in held for each in (part if isinstance(part, tuple | list) else (part,))]
    return sum(each.numel() * each.element_size() for each in tensors)


def _expert_slots(lora_config: Any, d: Dimensions, gpus: int) -> int:
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    layer = SimpleNamespace(
        _w13_a_num_experts=d.experts,
        _w2_b_num_experts=d.experts,
        local_num_experts=d.experts,
        fully_sharded=False,
        tp_size=gpus,
        hidden_size=d.hidden,
        intermediate_size_per_partition=d.intermediate // gpus,
        _w13_slices=2,
        device="meta",
    )
    for make in (FusedMoEWithLoRA._create_lora_a_weights, FusedMoEWithLoRA._create_lora_b_weights):
        make(layer, SLOTS, lora_config)
    return _held(layer, "w13_lora") + _held(layer, "w2_lora")


def platform() -> Iterator[dict[str, Any]]:
    """What vLLM's CUDA platform makes of `loradock serve MODEL`, over a stub of NVIDIA's library and no device."""
    from serve.config import load
    from serve.models import gpus, hardware
    from serve.server import launch
    from tests.support.nvml import Nvml

    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C"):
        sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    import vllm.config.vllm
    import vllm.utils.import_utils
    import vllm.v1.worker.gpu.lora_utils  # by the CPU's platform: it asks CUDA's kernels what they can
    from vllm import platforms

    nvml = Nvml([])
    vllm.utils.import_utils.import_pynvml = lambda: nvml
    from vllm.platforms import cuda

    platforms._current_platform = cuda.NvmlCudaPlatform()
    vllm.config.vllm.HAS_TRITON = True  # as it is where there is a GPU: it decides which model runner computes
    found = mock.patch.object(launch, "find", lambda model, cache, **_: model)
    on_gpu = mock.patch.object(hardware, "on_cpu", lambda: False)
    driver = mock.patch.object(gpus, "_library", lambda: nvml)
    with found, on_gpu, driver:
        for card, many in CARDS:
            nvml.devices = [DEVICES[card]] * many
            for cached in (cuda.NvmlCudaPlatform.get_device_name, cuda.NvmlCudaPlatform.get_device_total_memory):
                getattr(cached, "cache_clear", lambda: None)()
            words = [folder("Llama-3.1-8B-Instruct"), "--skip-tokenizer-init", "--tensor-parallel-size", str(many)]
            (base,) = launch.resolved(load(words, {})).bases
            yield {"card": card, "gpus": many, **_configured(base, platforms.current_platform)}


def _configured(base: Any, current: Any) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu.lora_utils import get_lora_capture_cases

    from serve.vllm_backend.engine_arguments import parse

    args = AsyncEngineArgs.from_cli_args(parse(base.model, base.name, base.engine))
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    return {
        "platform": type(current).__name__,
        "executor": Executor.get_class(config).__name__,
        "second_runner": config.use_v2_model_runner,
        "worker": config.parallel_config.worker_cls,
        "extension": config.parallel_config.worker_extension_cls,
        "method": os.environ["VLLM_WORKER_MULTIPROC_METHOD"],
        "policy": config.scheduler_config.policy,
        "tokens": config.scheduler_config.max_num_batched_tokens,
        "sequences": config.scheduler_config.max_num_seqs,
        "graphs": str(config.compilation_config.cudagraph_mode),
        "captured": list(config.compilation_config.cudagraph_capture_sizes),
        "lora_cases": get_lora_capture_cases(config.lora_config, config.compilation_config),
        "slots": config.lora_config.max_loras,
        "in_memory": config.lora_config.max_cpu_loras,
        "rank": config.lora_config.max_lora_rank,
        "utilization": config.cache_config.gpu_memory_utilization,
        "block": config.cache_config.block_size,
    }


if __name__ == "__main__":
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_PLUGINS="none")  # before vLLM is imported
    print(json.dumps(list({"sizes": sizes, "platform": platform}[sys.argv[1]]())))
