"""Every step of small random models in each format of weights, by the fused step and by vLLM layer by layer.

    python -m tests.campaigns.stepwise_formats OUT.json FOLDER

As `tests.campaigns.stepwise`, over checkpoints as compressed-tensors, GPTQ and AWQ lay them out, and over bfloat16
ones whose numbers 4 bits hold, served with `--cpu-weights int4`: so all that lies between the two is rounding of
activations.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.campaigns.stepwise import RANKS, adapters, run
from tests.support.quantized import Scheme, save

SIZES = {
    "hidden_size": 576,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
# Fused layers' scales of blocks are cut at their borders.
BLOCKS = {**SIZES, "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
SCHEMES = {
    "pack-quantized g32": Scheme("pack-quantized", group=32),
    "pack-quantized g64 with zero points": Scheme("pack-quantized", group=64, points=True),
    "gptq g64": Scheme("gptq", group=64),
    "awq g64": Scheme("awq", group=64, points=True),
    "w8a16": Scheme("pack-quantized", bits=8),
    "float8": Scheme("float-quantized"),
    "float8 in blocks": Scheme("fp8", group=128),
    "int4": Scheme("pack-quantized", group=32),  # in bfloat16
}


def main(out: Path, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from serve.models.hardware import cpu_environment

    os.environ.update(cpu_environment(os.environ, together=True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from serve.cpu_kernels import build
    from serve.vllm_backend import plugin

    plugin.install()
    if not build.step_available():
        out.write_text("null")
        return
    found = {}
    for number, (name, scheme) in enumerate(SCHEMES.items()):
        torch.manual_seed(0)
        sizes = BLOCKS if scheme.layout == "fp8" else SIZES
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=(320, 333)[number % 2])).to(torch.bfloat16)
        plain = folder / f"plain-{sizes['hidden_size']}"
        if not plain.is_dir():
            model.save_pretrained(plain)
            adapters(plain, folder / f"{plain.name}-adapters", RANKS)
        save(model, scheme, folder / str(number), dense=name == "int4")
        os.environ["LORADOCK_CPU_WEIGHTS"] = "int4" if name == "int4" else "auto"
        found[name] = run(folder / str(number), [folder / f"{plain.name}-adapters" / rank for rank in RANKS])
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
