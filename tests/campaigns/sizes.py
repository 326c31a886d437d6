"""What the steps need on models of a size that people have, against what `--plan` says: memory and time.

    python -m tests.campaigns.sizes [--billions 1] [--step merge --step w4a16 ...] [--samples 32] [--tokens 512]
        [--layers 2] [--model DIR] [--limit 12] [--kill] [--without-bfloat16]

The weights are random, in Llama's shape, with the embedded model's tokenizer; in --model they are made once and stay.
With --layers there are fewer of them: a step holds one at a time, so that it takes the same memory in less time.
Everything else lies in --folder meanwhile. With --limit, in GB and as root, a run is in a memory control group, which
the kernel holds to it as it holds a container. With --kill a run is killed by SIGKILL half way through its longest step
and resumed. With --without-bfloat16 the steps take the processor for one that does not multiply bfloat16, as those
with AVX2 alone, and compute in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch

from optimize.checkpoint.checkpoint import ADAPTER, Checkpoint, Writer
from serve.models import embedded

ROOT = Path(__file__).parents[2]

# billions of weights -> hidden size, MLP width, layers, heads, heads of keys and values, vocabulary, whether the output
# layer is the embedding: SmolLM2's shape, Qwen2.5's of 0.5B and 1.5B, and Llama 3's
SHAPES = {
    0.1: (576, 1536, 30, 9, 3, 49_152, True),
    0.5: (896, 4864, 24, 14, 2, 151_936, True),
    1.5: (1536, 8960, 28, 12, 2, 151_936, True),
    1: (2048, 8192, 16, 32, 8, 128_256, True),
    8: (4096, 14336, 32, 32, 8, 128_256, False),
}
STEPS = {
    "merge": "steps: [{merge: {adapters: [one]}}]",
    "w4a16": "steps: [{quantize: {scheme: w4a16}}]",
    "gptaq": "steps: [{quantize: {scheme: w4a16, method: gptaq}}]",
    "w8a8": "steps: [{quantize: {scheme: w8a8}}]",
    "zeros": "steps: [{prune: {pattern: 2:4}}]",
    "layers": "steps: [{prune: {layers: 2}}]",
    "onnx-int4": "export: {format: onnx, precision: int4}",
}


FLOAT32 = "from optimize import processor\nprocessor.multiplies_bfloat16 = lambda: False\n"
HEAD = """| recipe | step | memory planned, GB | measured | seconds planned | measured | of CPU |
|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, choices=list(SHAPES), default=1)
    parser.add_argument("--step", action="append", choices=list(STEPS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--limit", type=float, default=0.0)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--without-bfloat16", action="store_true")
    asked = parser.parse_args()
    print(f"{processor()}, {datetime.now(UTC):%Y-%m-%d}, {asked.samples} x {asked.tokens} tokens of calibration")
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        model, adapter = asked.model or Path(folder) / "model", Path(folder) / "one"
        if not model.is_dir():
            shutil.rmtree(part := model.with_name(model.name + ".part"), ignore_errors=True)
            made(part, asked.billions, asked.layers).rename(model)
        shaped(model, adapter)
        if asked.without_bfloat16:
            (Path(folder) / "sitecustomize.py").write_text(FLOAT32)
            os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT)])
        for name in asked.step or ("merge", "w4a16"):
            recipe, out = Path(folder) / f"{name}.yaml", Path(folder) / f"out-{name}"
            recipe.write_text(
                f"model: {model.resolve()}\n{STEPS[name]}\n"
                f"adapters: {{{f'one: {adapter}' if 'one' in STEPS[name] else ''}}}\n"
                f"calibration: {{samples: {asked.samples}, tokens: {asked.tokens}}}\n"
                "evaluate: {samples: 2, tokens: 128, engine: false, prompts: []}\n"
            )
            measured(name, recipe, out, asked.limit, asked.kill)
            for made_by_it in Path(folder).glob(f"out-{name}*"):
                shutil.rmtree(made_by_it)
    return 0


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def measured(name: str, recipe: Path, out: Path, limit: float, kill: bool) -> None:
    """Run the recipe through the command line, as a user does, and print a row for each of its steps."""
    memory = ["--memory", str(limit)] if limit else []
    with Group(limit) as group:
        command = [sys.executable, "-m", "serve.cli", "optimize", str(recipe), "--out", str(out), "--json", *memory]
        planned = json.loads(subprocess.check_output([*command, "--plan"], cwd=ROOT))["steps"]
        if kill:
            killed(command, max(planned, key=lambda step: step["seconds"])["kind"], group)
        subprocess.run([*command, "--resume"], cwd=ROOT, check=True, preexec_fn=group.enter, stdout=subprocess.DEVNULL)
        steps = json.loads((out / "report" / "measurements.json").read_text())["steps"]
        done = {step["step"]: step["notes"] for step in steps}
        for step in planned:
            if step["kind"] in done:
                found = done[step["kind"]]
                print(
                    f"| {name} | {step['kind']} | {step['memory'] / 1e9:.2f} | {found['memory'] / 1e9:.2f} "
                    f"| {step['seconds']:.1f} | {found['seconds']:.1f} | {found['cpu_seconds']:.1f} |",
                    flush=True,
                )
        print(group.said, file=sys.stderr)


def killed(command: list[str], kind: str, group: Group) -> None:
    """Begin the run and kill it half way through the step `kind`."""
    run = subprocess.Popen(command, cwd=ROOT, preexec_fn=group.enter, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        said = json.loads(line)
        if said.get("step") == kind and 0.5 <= said["done"] / said["total"] < 1:
            run.kill()
            break
    run.wait()
    print(f"killed in {kind}: {line.strip()}", file=sys.stderr)


class Group:
    """A memory control group of version 1 or 2 that holds `limit` GB, or none for 0."""

    def __init__(self, limit: float) -> None:
        top = Path("/sys/fs/cgroup")
        self.new = (top / "cgroup.controllers").is_file()
        self.folder = (top if self.new else top / "memory") / f"loradock-sizes-{os.getpid()}" if limit else None
        self.bytes = int(limit * 1e9)

    def __enter__(self) -> Self:
        if self.folder:
            self.folder.mkdir()
            (self.folder / ("memory.max" if self.new else "memory.limit_in_bytes")).write_text(str(self.bytes))
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder:
            self.folder.rmdir()

    def enter(self) -> None:
        """Puts the calling process into it."""
        if self.folder:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def said(self) -> str:
        """What the kernel counted, pages of files that it can take back among it."""
        if not self.folder:
            return "no limit"
        names = ("memory.peak", "memory.events") if self.new else ("memory.max_usage_in_bytes", "memory.oom_control")
        peak, events = ((self.folder / name).read_text() for name in names)
        most = f"at most {int(peak) / 1e9:.1f} GB with pages of files"
        return f"limit {self.bytes / 1e9:g} GB, {most}, {' '.join(events.split())}"


def made(folder: Path, billions: float, fewer: int = 0) -> Path:
    """Random weights in Llama's shape, a tensor at a time."""
    hidden, width, layers, heads, kv_heads, vocabulary, tied = SHAPES[billions]
    layers, head = fewer or layers, hidden // heads
    like = embedded.ensure("smollm2")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocabulary, hidden)})
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
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head, "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
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
