"""What the steps need on models of a size that people have, against what `--plan` says: memory and time.

    python -m tests.campaigns.sizes [--billions 1] [--step merge --step w4a16 ...] [--samples 32] [--tokens 512]

The weights are random, in Llama's shape, with the embedded model's tokenizer. Everything lies in --folder meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from optimize import recipe as recipes
from optimize.checkpoint.checkpoint import ADAPTER, Checkpoint, Writer
from optimize.errors import GateFailed
from optimize.pipeline import plan as plans
from optimize.pipeline.run import Run, texts
from serve.models import embedded

# billions of weights -> hidden size, MLP width, layers, heads, heads of keys and values
SHAPES = {0.1: (576, 1536, 30, 9, 3), 1: (2048, 8192, 16, 32, 8), 8: (4096, 14336, 32, 32, 8)}
STEPS = {
    "merge": "steps: [{merge: {adapters: [one]}}]",
    "w4a16": "steps: [{quantize: {scheme: w4a16}}]",
    "w8a8": "steps: [{quantize: {scheme: w8a8}}]",
    "zeros": "steps: [{prune: {pattern: 2:4}}]",
    "layers": "steps: [{prune: {layers: 2, choose: influence}}]",
    "onnx-int4": "export: {format: onnx, precision: int4}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, choices=list(SHAPES), default=1)
    parser.add_argument("--step", action="append", choices=list(STEPS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {datetime.now(UTC):%Y-%m-%d}", flush=True)
    print("| recipe | step | memory planned, GB | measured | seconds planned | measured |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model, adapter = made(Path(folder) / "model", arguments.billions), Path(folder) / "one"
        shaped(model, adapter)
        for name in arguments.step or ("merge", "w4a16"):
            written = (
                f"model: {model}\n{STEPS[name]}\n"
                f"adapters: {{{f'one: {adapter}' if 'one' in STEPS[name] else ''}}}\n"
                f"calibration: {{samples: {arguments.samples}, tokens: {arguments.tokens}}}\n"
                "evaluate: {samples: 2, tokens: 128, engine: false, prompts: []}\n"
            )
            measured(name, recipes.parse(written, Path(folder)), model, Path(folder) / f"out-{name}")
            shutil.rmtree(Path(folder) / f"out-{name}", ignore_errors=True)
    return 0


def measured(name: str, recipe: Any, model: Path, out: Path) -> None:
    recipe = recipes.changed(recipe, output=str(out))
    plan = plans.made(recipe, model, texts(recipe), out, 10**12)
    run = Run(recipe, plan, out, 10**12, lambda *_: None)
    try:
        run()
    except GateFailed as failed:
        print(failed.message, file=sys.stderr)
    planned = {step.kind: step for step in plan.steps}
    for done in run.done:
        of = planned[done.kind]
        memory, seconds = done.notes["memory"] / 1e9, done.seconds
        print(
            f"| {name} | {done.kind} | {of.memory / 1e9:.1f} | {memory:.1f} | {of.seconds:.0f} | {seconds:.0f} |",
            flush=True,
        )


def made(folder: Path, billions: float) -> Path:
    """Random weights in Llama's shape, a tensor at a time."""
    hidden, width, layers, heads, kv_heads = SHAPES[billions]
    head = hidden // heads
    like = embedded.ensure("smollm2")
    vocabulary = int(Checkpoint(like).config["vocab_size"])
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for at in range(layers):
        inside = f"model.layers.{at}"
        shapes |= {f"{inside}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
        shapes |= {f"{inside}.self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()}
        shapes[f"{inside}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes |= {f"{inside}.mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{inside}.mlp.down_proj.weight"] = (hidden, width)
    torch.manual_seed(0)
    writer = Writer(folder, like)
    for name, shape in shapes.items():
        one = len(shape) == 1
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        writer.add(name, torch.ones(shape).bfloat16() if one else (torch.randn(shape, dtype=torch.bfloat16) * scale))
    config = {
        **Checkpoint(like).config, "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head, "tie_word_embeddings": True,
    }  # fmt: skip
    writer.close(config)
    return folder


def shaped(model: Path, folder: Path, rank: int = 16) -> None:
    """A random adapter on every linear layer of `model`."""
    from safetensors.torch import save_file

    tensors = {}
    for name, entry in Checkpoint(model).entries.items():
        if name.endswith("_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, entry.shape[1]) * entry.shape[1] ** -0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(entry.shape[0], rank) * 0.02
    folder.mkdir()
    save_file(tensors, folder / ADAPTER, {"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
