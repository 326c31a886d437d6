"""Each family's export in vLLM, with an adapter and without, against PyTorch's reading of the same export.

    python -m tests.campaigns.families [--family Llama ...] [--scheme w8a8]

A tiny random model of the family is quantized with SmoothQuant or AWQ folded into it and into an adapter, and loaded in
vLLM; both read the same text. Log-perplexity has to be within 0.05, and the likeliest token the same in 9 places of 10.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimize.checkpoint.model import adapted, logits, opened
from optimize.errors import OptimizeError, Refused
from optimize.evaluation.engine import Engine
from optimize.job import Job
from optimize.options import STEPS, Evaluate, Text
from optimize.steps.quantize import quantize
from tests.support import families

SCHEMES = {"w8a8": {"scheme": "w8a8", "smooth": True}, "w4a16": {"scheme": "w4a16", "method": "awq"}}
IN_VLLM: dict[str, dict[str, Any]] = {"Qwen2.5, windows": {"max_window_layers": 3}}  # a window in all layers or in none
DIFFERENCE, AGREEMENT = 0.05, 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=list(families.CONFIGS))
    parser.add_argument("--scheme", choices=list(SCHEMES), default="w8a8")
    arguments = parser.parse_args()
    AutoTokenizer.from_pretrained = PreTrainedTokenizerFast.from_pretrained  # Qwen2's is always its own
    print("| family | with | log-perplexity, PyTorch | vLLM | same likeliest token | |\n|---|---|---|---|---|---|")
    good = True
    for name in arguments.family or families.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            good &= compared(name, Path(folder), arguments.scheme)
    return 0 if good else 1


def compared(name: str, folder: Path, scheme: str) -> bool:
    """Whether vLLM computes what PyTorch does, with the family's row in the table."""
    base = families.written(name, folder / "base", "bfloat16", **IN_VLLM.get(name, {}))
    adapter = families.adapter(base, folder / "one", 1)
    text = folder / "text.txt"
    text.write_text("\n\n\n".join(families.sentences(1, 24)))
    job = Job(
        kind="quantize", options=msgspec.to_builtins(STEPS["quantize"](**SCHEMES[scheme])), model=str(base),
        base=str(base), reference=str(base), adapters={"one": str(adapter)}, originals={"one": str(adapter)},
        calibration=Text(text=str(text), samples=8, tokens=48), evaluate=Evaluate(), seed=0, target="cpu",
        out=str(folder),
    )  # fmt: skip
    try:
        quantize.run(job, lambda *_: None)
    except Refused as refused:
        print(f"| {name} | | | | | {refused.message} |", flush=True)
        return True
    out, rewritten = folder / "model", folder / "adapters" / "one"
    rows = torch.randint(3, 100, (8, 48), generator=torch.Generator().manual_seed(1))
    model: Any = opened(out)
    right = {"": logits(model, rows)}
    with adapted(model, rewritten) as both:
        right["one"] = logits(both, rows)
    good = True
    try:
        with Engine("export", str(out), {"one": str(rewritten)}, "cpu", 256) as engine:
            for adapter_name, ours in right.items():
                good &= row(name, adapter_name, ours, rows, engine)
    except OptimizeError as error:
        print(f"| {name} | | | | | {error.message} |", flush=True)
        return False
    return good


def row(name: str, adapter: str, ours: torch.Tensor, rows: torch.Tensor, engine: Engine) -> bool:
    said = engine.ask({"text": rows.tolist(), "adapter": adapter})
    loss = -float(ours[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None]).mean())
    agree = float((ours[:, :-1].argmax(-1) == torch.tensor(said["likeliest"])).float().mean())
    good = abs(loss - said["loss"]) <= DIFFERENCE and agree >= AGREEMENT
    shown = f"| {name} | {adapter or 'the base'} | {loss:.4f} | {said['loss']:.4f} | {agree:.1%} |"
    print(f"{shown} {'' if good else '**different**'} |", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
