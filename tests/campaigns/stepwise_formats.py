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

from tests.campaigns.stepwise import adapters, run
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
SCHEMES = {
    "pack-quantized g32": Scheme("pack-quantized", group=32),
    "pack-quantized g64 with zero points": Scheme("pack-quantized", group=64, points=True),
    "gptq g64": Scheme("gptq", group=64),
    "awq g64": Scheme("awq", group=64, points=True),
    "w8a16": Scheme("pack-quantized", bits=8),
    "float8": Scheme("float-quantized"),
    "int4": Scheme("dense", group=32),
}


def main(out: Path, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from serve.models.hardware import cpu_environment

    os.environ.update(cpu_environment(os.environ, together=True))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from serve.cpu_kernels import build, install

    install.install()
    if not build.step_available():
        out.write_text("null")
        return
    found = {}
    loras = None
    for number, (name, scheme) in enumerate(SCHEMES.items()):
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, vocab_size=(320, 333)[number % 2])
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        if loras is None:
            model.save_pretrained(folder / "plain")
            loras = adapters(folder / "plain", folder / "adapters")
        save(model, scheme, folder / str(number))
        os.environ["LORADOCK_CPU_WEIGHTS"] = "int4" if scheme.layout == "dense" else "auto"
        found[name] = run(folder / str(number), loras)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
