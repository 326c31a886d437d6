"""Each family's export in vLLM, with an adapter and without, against PyTorch's reading of the same export.

    python -m tests.campaigns.families [--family Llama ...] [--scheme w8a8]
    python -m tests.campaigns.families --onnx transformers      # or optimum: each family's ONNX graph against PyTorch

A tiny random model of the family is quantized with SmoothQuant or AWQ folded into it and into an adapter, and loaded in
vLLM; both read the same text. Log-perplexity has to be within 0.05, and in 9 places of 10 vLLM's likeliest token the
same, or as likely but for bfloat16's rounding: Gemma 2's soft cap puts many logits on the cap.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimize import recipe as recipes
from optimize.checkpoint.model import adapted, logits, opened
from optimize.errors import OptimizeError, Refused
from optimize.evaluation.engine import Engine
from optimize.export import onnx
from optimize.job import Job
from optimize.options import Evaluate, Text
from optimize.pipeline import plan
from optimize.steps.kind import kinds
from optimize.steps.quantize import quantize
from tests.support import families

SCHEMES = {"w8a8": {"scheme": "w8a8", "smooth": True}, "w4a16": {"scheme": "w4a16", "method": "awq"}}
IN_VLLM: dict[str, dict[str, Any]] = {"Qwen2.5, windows": {"max_window_layers": 3}}  # a window in all layers or in none
# Cohere 2's windows are a token longer in vLLM, which says that the models were trained so, than in transformers.
IN_PYTORCH = {"Cohere 2": {"sliding_window": families.WINDOW + 1}}
DIFFERENCE, AGREEMENT = 0.05, 0.9
ROUNDING = 2**-8  # of bfloat16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=list(families.CONFIGS))
    parser.add_argument("--scheme", choices=list(SCHEMES), default="w8a8")
    parser.add_argument("--onnx", choices=["transformers", "optimum"], default="")
    arguments = parser.parse_args()
    AutoTokenizer.from_pretrained = PreTrainedTokenizerFast.from_pretrained  # Qwen2's is always its own
    if arguments.onnx:
        print("| family | with | largest difference of a logit | greedy tokens the same | |\n|---|---|---|---|---|")
    else:
        print("| family | with | log-perplexity, PyTorch | vLLM | same likeliest token | |\n|---|---|---|---|---|---|")
    check = partial(in_onnx, exporter=arguments.onnx) if arguments.onnx else partial(compared, scheme=arguments.scheme)
    good = True
    for name in arguments.family or families.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            good &= check(name, Path(folder))
    return 0 if good else 1


def compared(name: str, folder: Path, scheme: str) -> bool:
    """Whether vLLM computes what PyTorch does, with the family's row in the table."""
    base = families.written(name, folder / "base", "bfloat16", **IN_VLLM.get(name, {}))
    adapter = families.adapter(base, folder / "one", 1)
    text = folder / "text.txt"
    text.write_text("\n\n\n".join(families.sentences(1, 24)))
    for adapters in ({"one": str(adapter)}, {}):
        try:
            _refuse(base, adapters, scheme)
            break
        except Refused as refused:
            print(f"| {name} | {'one' if adapters else 'the base'} | | | | {refused.message} |", flush=True)
    else:
        return True
    job = Job(
        kind="quantize", options=msgspec.to_builtins(kinds()["quantize"].options(**SCHEMES[scheme])), model=str(base),
        base=str(base), reference=str(base), adapters=adapters, originals=adapters,
        calibration=Text(text=str(text), samples=8, tokens=48), evaluate=Evaluate(), seed=0, target="cpu",
        out=str(folder),
    )  # fmt: skip
    quantize.run(job, lambda *_: None)
    out = folder / "model"
    rewritten = {name: folder / "adapters" / name for name in adapters}
    rows = torch.randint(3, 100, (8, 48), generator=torch.Generator().manual_seed(1))
    model: Any = opened(_with(out, folder / "pytorch", IN_PYTORCH.get(name, {})))
    right = {"": logits(model, rows)}
    for adapter_name, place in rewritten.items():
        with adapted(model, place) as both:
            right[adapter_name] = logits(both, rows)
    good = True
    try:
        with Engine("export", str(out), {name: str(place) for name, place in rewritten.items()}, "cpu", 256) as engine:
            for adapter_name, ours in right.items():
                good &= row(name, adapter_name, ours, rows, engine)
    except OptimizeError as error:
        print(f"| {name} | | | | | {error.message} |", flush=True)
        return False
    return good


def _refuse(base: Path, adapters: Mapping[str, str], scheme: str) -> None:
    """What the plan of such a recipe says."""
    options = json.dumps(SCHEMES[scheme])
    read = recipes.parse(
        f"model: {base}\nadapters: {json.dumps(adapters)}\nsteps: [{{quantize: {options}}}]\n", base.parent
    )
    plan.made(read, base, {}, base.parent / "out", 10**12)


def _with(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The same weights under another config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def in_onnx(name: str, folder: Path, exporter: str) -> bool:
    """Whether ONNX Runtime computes what PyTorch does, in fp32, with the family's rows in the table."""
    base = families.written(name, folder / "base")
    adapter = families.adapter(base, folder / "one", 1)
    options = {"format": "onnx", "precision": "fp32", "exporter": exporter}
    written = f"model: {base}\nadapters: {{one: {adapter}}}\nexport: {json.dumps(options)}\n"
    job = Job(
        kind="onnx", options=options, model=str(base), base=str(base), reference=str(base),
        adapters={"one": str(adapter)}, originals={"one": str(adapter)}, calibration=Text(), evaluate=Evaluate(),
        seed=0, target="cpu", out=str(folder),
    )  # fmt: skip
    try:
        plan.made(recipes.parse(written + "evaluate: {engine: false}\n", folder), base, {}, folder / "out", 10**12)
        checked = onnx.run(job, lambda *_: None)["checked"]
    except Refused as refused:
        print(f"| {name} | | | | {refused.message} |", flush=True)
        return True
    except Exception as error:
        print(f"| {name} | | | | **{type(error).__name__}**: {' '.join(str(error).split())[:300]} |", flush=True)
        return False
    for key, found in checked.items():
        print(f"| {name} | {key} | {found['logits_off']:.2g} | {found['greedy_same']} | |", flush=True)
    return True


def row(name: str, adapter: str, ours: torch.Tensor, rows: torch.Tensor, engine: Engine) -> bool:
    said = engine.ask({"text": rows.tolist(), "adapter": adapter})
    loss = -float(ours[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None]).mean())
    before = ours[:, :-1]
    most, theirs = before.amax(-1), before.gather(-1, torch.tensor(said["likeliest"])[..., None]).squeeze(-1)
    agree = float((theirs >= most - ROUNDING * most.abs()).float().mean())
    good = abs(loss - said["loss"]) <= DIFFERENCE and agree >= AGREEMENT
    shown = f"| {name} | {adapter or 'the base'} | {loss:.4f} | {said['loss']:.4f} | {agree:.1%} |"
    print(f"{shown} {'' if good else '**different**'} |", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
