"""A decoder's dimensions, from its config.json or, for models that many serve, from a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ConfigError
from serve.models.checkpoint import gguf_file

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# vLLM fills vocabularies up to a multiple of so many.
PADDED = 64


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Of a decoder with attention and an MLP, or experts, in each layer; `width` in bytes of a weight."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    context: int
    experts: int = 0
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    width: int = 2
    architecture: str = "LlamaForCausalLM"

    @property
    def vocabulary_padded(self) -> int:
        return -(-self.vocabulary // PADDED) * PADDED

    def weights(self, parts: int = 1) -> int:
        """Bytes of weights on each of so many GPUs, by tensor parallelism as vLLM has it."""
        queries = self.heads * self.head // parts
        keys = self.kv_heads_on(parts) * self.head
        attention = self.hidden * (2 * queries + 2 * keys)
        attention += (queries + 2 * keys if self.qkv_bias else 0) + (2 * self.head if self.qk_norm else 0)
        mlp = 3 * self.hidden * self.intermediate // parts
        if self.experts:
            mlp = self.experts * mlp + self.experts * self.hidden
        tables = (1 if self.tied else 2) * self.vocabulary_padded * self.hidden // parts
        return self.width * (self.layers * (attention + mlp + 2 * self.hidden) + tables + self.hidden)

    def kv_heads_on(self, parts: int) -> int:
        return max(self.kv_heads // parts, 1)

    def kv_token(self, parts: int = 1) -> int:
        """Bytes that one token of context takes on each GPU, in the precision of the weights."""
        return 2 * self.layers * self.kv_heads_on(parts) * self.head * self.width

    def slot(self, rank: int, parts: int = 1, *, tables: bool = True) -> int:
        """Bytes on each GPU that an adapter's slot in the batch takes, with room for every module that vLLM adapts.

        Of a layer that is cut by its outputs the A matrices are on every GPU, of one that is cut by its inputs the B
        matrices. tables: the embedding and the output layer too, which are whole on every GPU.
        """
        queries, keys = self.heads * self.head // parts, self.kv_heads_on(parts) * self.head
        attention = 3 * self.hidden + queries + 2 * keys + queries + self.hidden
        cut = self.intermediate // parts
        mlp = max(self.experts, 1) * (2 * self.hidden + 2 * cut + cut + self.hidden)
        router = self.hidden + self.experts if self.experts else 0
        both = 2 * (self.vocabulary + self.hidden) if tables else 0
        return self.width * rank * (self.layers * (attention + mlp + router) + both)

    def adapter(self, rank: int) -> int:
        """Bytes of an adapter of all linear layers."""
        return self.slot(rank, tables=False)


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, **more: Any) -> Any:
    given = {"head": hidden // heads, "context": 131_072} | more
    return Dimensions(layers, hidden, heads, kv_heads, intermediate=intermediate, vocabulary=vocabulary, **given)


def _qwen(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, **more: Any) -> Any:
    given = {"head": 128, "context": 40_960, "qk_norm": True, "architecture": "Qwen3ForCausalLM"} | more
    return _llama(layers, hidden, heads, kv_heads, intermediate, 151_936, **given)


# Public hyperparameters of models that many serve, by the last part of their hub ids.
_LLAMA_8B = _llama(32, 4096, 32, 8, 14_336, 128_256)
_LLAMA_70B = _llama(80, 8192, 64, 8, 28_672, 128_256)
KNOWN: dict[str, Dimensions] = {
    "Llama-3.1-8B": _LLAMA_8B,
    "Llama-3.1-8B-Instruct": _LLAMA_8B,
    "Llama-3.1-70B-Instruct": _LLAMA_70B,
    "Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Llama-3.2-1B-Instruct": _llama(16, 2048, 32, 8, 8192, 128_256, tied=True),
    "Llama-3.2-3B-Instruct": _llama(28, 3072, 24, 8, 8192, 128_256, tied=True),
    "Qwen3-0.6B": _qwen(28, 1024, 16, 8, 3072, tied=True),
    "Qwen3-1.7B": _qwen(28, 2048, 16, 8, 6144, tied=True),
    "Qwen3-4B": _qwen(36, 2560, 32, 8, 9728, tied=True),
    "Qwen3-8B": _qwen(36, 4096, 32, 8, 12_288),
    "Qwen3-14B": _qwen(40, 5120, 40, 8, 17_408),
    "Qwen3-32B": _qwen(64, 5120, 64, 8, 25_600),
    "Mistral-7B-Instruct-v0.3": _llama(
        32, 4096, 32, 8, 14_336, 32_768, context=32_768, architecture="MistralForCausalLM"
    ),
    "Mixtral-8x7B-Instruct-v0.1": _llama(
        32, 4096, 32, 8, 14_336, 32_000, context=32_768, experts=8, architecture="MixtralForCausalLM"
    ),
    "Mixtral-8x22B-Instruct-v0.1": _llama(
        56, 6144, 48, 8, 16_384, 32_768, context=65_536, experts=8, architecture="MixtralForCausalLM"
    ),
}


def dimensions(model: str) -> Dimensions:
    """Of a checkpoint's directory, a GGUF file, or a hub id whose last part is in the table; or ConfigError."""
    if gguf_file(model) is not None:
        from serve.models.gguf.families import plan
        from serve.models.gguf.file import GGUF

        return read(plan(GGUF.open(Path(model))).config)
    file = Path(model) / "config.json"
    if file.is_file():
        try:
            return read(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{file} does not say what is needed to plan for a GPU: {error!r}") from error
    known = {name.lower(): made for name, made in KNOWN.items()}
    name = model.rstrip("/").rpartition("/")[2].lower()
    if name not in known:
        raise ConfigError(
            f"{model} is no directory with a config.json, and its sizes are not known here: take a directory, or one "
            f"of {', '.join(KNOWN)}"
        )
    return known[name]


def read(config: Mapping[str, Any]) -> Dimensions:
    """From what a config.json says."""
    config = config.get("text_config") or config
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kind = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    model = str(config.get("model_type", ""))
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    middle = config["moe_intermediate_size"] if experts and config.get("moe_intermediate_size") else None
    return Dimensions(
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head=int(config.get("head_dim") or hidden // heads),
        intermediate=int(middle or config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        context=int(config.get("max_position_embeddings") or 2048),
        experts=experts,
        tied=bool(config.get("tie_word_embeddings", model in ("gemma2", "gemma3_text"))),
        qk_norm=model.startswith(("qwen3", "olmo2", "gemma3")),
        qkv_bias=bool(config.get("attention_bias", model.startswith("qwen2"))),
        width=BYTES.get(kind, 2),
        architecture=str((config.get("architectures") or [""])[0]),
    )
