"""How much memory a model takes with so many adapters, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ConfigError
from serve.models import engine_memory, hardware
from serve.models.lora_modules import lora_modules, module_shapes

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes; `kv_token` is what one token of context takes in the KV cache.

    `table` is an embedding or an output layer that an adapter brings whole. It is mapped from the adapter's file, whose
    pages the kernel takes back, so it is no part of the total.
    """

    weights: int
    kv_token: int
    kv_cache: int
    adapter: int
    table: int
    slots: int
    host: int
    overhead: int
    free: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.slots + self.host + self.overhead

    @property
    def tokens(self) -> int:
        """Of context that the KV cache holds, all requests together."""
        return self.kv_cache // max(self.kv_token, 1)

    @property
    def fits(self) -> bool:
        return self.total <= self.free


def plan(
    model: str, *, max_loras: int, max_cpu_loras: int, rank: int, kv_cache: int | None, cpu_weights: str = "auto"
) -> Plan:
    """The sizes for a checkpoint directory or hub id, from its configuration and the sizes of its files."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} is not a model that can be read: {str(error).splitlines()[0]}") from error
    config = getattr(config, "text_config", config)
    width = BYTES.get(str(getattr(config, "dtype", "bfloat16")).removeprefix("torch."), 2)
    on_cpu = hardware.on_cpu()
    weights = engine_memory.weights(Path(model), cpu_weights, hardware.fused_step())
    weights = weights or width * sum(out * into for out, into in module_shapes(model).values())
    modules = lora_modules(model)
    linear = [shape for name, shape in modules.items() if not name.endswith(("embed_tokens", "lm_head", "wte"))]
    adapter = width * rank * sum(out + into for out, into in linear)
    # vLLM's slots have room for every module that may be adapted, the embedding and output layer too; on a CPU these
    # take memory only where an adapter has them.
    slot = adapter if on_cpu else width * rank * sum(out + into for out, into in modules.values())
    slots = max_loras * slot
    return Plan(
        weights=weights,
        kv_token=_kv_token(config, width),
        kv_cache=hardware.kv_space(weights + slots) if kv_cache is None else kv_cache,
        adapter=adapter,
        table=width * int(config.vocab_size) * int(config.hidden_size),
        slots=slots,
        # Where each has a slot for good, a CPU's memory holds it there alone.
        host=0 if on_cpu and max_cpu_loras <= max_loras else max_cpu_loras * adapter,
        overhead=hardware.OVERHEAD if on_cpu else hardware.GPU_OVERHEAD,
        free=hardware.free_memory(),
    )


def _kv_token(config: Any, width: int) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * width
