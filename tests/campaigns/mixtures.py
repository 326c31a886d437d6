"""What the first request for a mixture pays: the processor's time to make its files of those of its parts.

    python -m tests.campaigns.mixtures [--parts 3] [--rank 8] [--rounds 10]

The parts have the shapes of SmolLM2-135M's linear layers, in bfloat16 and in float16. From then on a mixture is one
adapter of the summed rank in the engine: what that costs a step is `tests.campaigns.adapter_cost --rank 24`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from serve.adapters.adapter import CONFIG, WEIGHTS
from serve.adapters.mixing.stacking import stack

LAYERS, HIDDEN, KEYS, INNER = 30, 576, 192, 1536
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def written(folder: Path, seed: int, rank: int, dtype: str) -> Path:
    """A PEFT folder of random numbers."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    entries, data = {}, []
    at = 0
    for layer in range(LAYERS):
        for module, (out, into) in SHAPES.items():
            for half, shape in (("A", (rank, into)), ("B", (out, rank))):
                values = rng.standard_normal(shape, np.float32)
                bits = (values.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else values.astype("<f2")
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"
                entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits.nbytes]}
                at += bits.nbytes
                data.append(bits.tobytes())
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data))
    modules = sorted({module.partition(".")[2] for module in SHAPES})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--parts", type=int, default=3)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--rounds", type=int, default=10)
    given = options.parse_args()
    for dtype in ("BF16", "F16"):
        with tempfile.TemporaryDirectory() as name:
            folder, found = Path(name), []
            parts = [(written(folder / f"{i}", i, given.rank, dtype), 1 / (i + 1)) for i in range(given.parts)]
            for number in range(given.rounds):
                into = folder / f"mixture-{number}"
                into.mkdir()
                began = time.thread_time()
                rank = stack(parts, into)
                found.append(1000 * (time.thread_time() - began))
        print(f"{given.parts} of rank {given.rank}, {dtype}: rank {rank} in {median(found):.1f} ms ({min(found):.1f})")


if __name__ == "__main__":
    main()
