"""Llamas of random weights, written file by file: none is ever whole in memory.

    python -m tests.campaigns.random_model 8B FOLDER [--w4a16]

The tokenizer is the embedded model's. Words that it does not have are never the likeliest: their outputs are zeros.
`--w4a16` writes linear layers of 4 bits, as compressed-tensors lays them out.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SIZES: dict[str, dict[str, int]] = {
    "300M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
             "num_key_value_heads": 8},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
FILE_BYTES = 1 << 30
ROWS = 1024  # of a weight that are drawn at a time


def random_model(size: str, like: Path, folder: Path, four_bits: bool = False) -> Path:
    """A Llama of random weights with the tokenizer of another model."""
    from transformers import LlamaConfig

    from tests.support.quantized import Scheme

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "config.json"))
    own = json.loads((like / "config.json").read_text())
    sizes = {"vocab_size": own["vocab_size"], **SIZES[size]}
    config = LlamaConfig(**sizes, max_position_embeddings=4096, bos_token_id=own["bos_token_id"],
                         eos_token_id=own["eos_token_id"], architectures=["LlamaForCausalLM"],
                         dtype="bfloat16")  # fmt: skip
    scheme = Scheme("pack-quantized", group=128) if four_bits else None
    config.save_pretrained(folder)
    if scheme is not None:
        told = json.loads((folder / "config.json").read_text()) | {"quantization_config": scheme.config()}
        (folder / "config.json").write_text(json.dumps(told))
    _write(_weights(config, own["vocab_size"], scheme), folder)
    return folder


def _weights(config: Any, words: int, scheme: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Of every layer, in order; `words` are the outputs that are no zeros."""
    import torch

    dice = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16)
        for rows in made.split(ROWS):
            rows.normal_(std=config.initializer_range, generator=dice)
        return made

    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    matrices = {
        "self_attn.q": (hidden, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden),
        "self_attn.o": (hidden, hidden), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
    }  # fmt: skip
    yield "model.embed_tokens.weight", random(config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
        for name, shape in matrices.items():
            if scheme is None:
                made: Mapping[str, torch.Tensor] = {"weight": random(*shape)}
            else:
                made = _numbers(*shape, scheme, config.initializer_range, dice)
            for part, tensor in made.items():
                yield f"{layer}.{name}_proj.{part}", tensor
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    head = random(config.vocab_size, hidden)
    head[words:] = 0
    yield "lm_head.weight", head


def _numbers(outputs: int, inputs: int, scheme: Any, spread: float, dice: Any) -> Mapping[str, torch.Tensor]:
    """Any 4 bits, which spread as the weights would."""
    import torch

    packed = torch.empty(outputs, inputs // 8, dtype=torch.int32).random_(-(1 << 31), (1 << 31) - 1, generator=dice)
    scale = torch.full((outputs, inputs // scheme.group), spread / 4.6, dtype=torch.bfloat16)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor((outputs, inputs))}


def _write(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    waiting: dict[str, torch.Tensor] = {}
    total = 0

    def save() -> None:
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        places.update(dict.fromkeys(waiting, file))
        save_file(waiting, folder / file, metadata={"format": "pt"})
        waiting.clear()

    for name, tensor in weights:
        if waiting and sum(each.nbytes for each in waiting.values()) + tensor.nbytes > FILE_BYTES:
            save()
        waiting[name] = tensor
        total += tensor.nbytes
    save()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    from serve.models.embedded import ensure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--w4a16", action="store_true")
    given = parser.parse_args()
    print(random_model(given.size, ensure("smollm2"), given.folder, given.w4a16))


if __name__ == "__main__":
    main()
