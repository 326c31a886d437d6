"""Processor seconds of quantizing and of measuring, by an earlier commit's code and by this one's, in turns.

    python -m tests.campaigns.optimize_cost [--before COMMIT] [--pairs 2] [--samples 8] [--tokens 256]

Both carry out the same recipes on the embedded model, before after after before. Each step says what it took of the
processor, and the whole run is asked too, in which imports are paid where steps are forks of one process. Other work on
the machine hardly changes the ratios. Perplexity and KL stand beside it: what is faster has to be as good.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
BEFORE = "cdc1c0e"  # before answers had a cache, and the search for scales went from coarse to fine
WHOLE = "whole run"
RECIPES = {
    "w4a16": "{scheme: w4a16}",
    "w8a8, SmoothQuant": "{scheme: w8a8, smooth: true}",
}
STEPS = ("quantize", "evaluate", WHOLE)
HEAD = """| recipe | step | processor seconds | after | ratio | perplexity | after | KL | after |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--recipe", action="append", choices=list(RECIPES))
    arguments = parser.parse_args()
    print(f"before: {arguments.before}; {arguments.samples} windows of {arguments.tokens} tokens")
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="loradock-cost-") as place:
        folder = Path(place)
        trees = {"before": tree(arguments.before, folder / "before"), "after": ROOT}
        for name in arguments.recipe or RECIPES:
            recipe = folder / "recipe.yaml"
            size = f"samples: {arguments.samples}, tokens: {arguments.tokens}"
            recipe.write_text(
                f"model: smollm2\nsteps: [{{quantize: {RECIPES[name]}}}]\ncalibration: {{{size}}}\n"
                f"evaluate: {{{size}, engine: false}}\n"
            )
            measured: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
            for pair in range(arguments.pairs):
                for which in sorted(trees, reverse=not pair % 2):
                    measured[which].append(run(trees[which], recipe, folder / f"{which}-{pair}-{len(name)}"))
            for step in STEPS:
                print(row(name, step, measured), flush=True)
    return 0


def tree(commit: str, folder: Path) -> Path:
    """The files of a commit."""
    packed = subprocess.check_output(["git", "archive", commit], cwd=ROOT)
    with tarfile.open(fileobj=BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    return folder


def run(code: Path, recipe: Path, out: Path) -> dict[str, Any]:
    """The measurements of a recipe that the code in a tree carries out."""
    command = [sys.executable, "-m", "serve.cli", "optimize", str(recipe), "--out", str(out), "--json"]
    environ = {**os.environ, "PYTHONPATH": str(code)}
    before = cpu_of_children()
    subprocess.run(command, cwd=code, env=environ, check=True, stdout=subprocess.DEVNULL)
    spent = cpu_of_children() - before
    measurements: dict[str, Any] = json.loads((out / "report" / "measurements.json").read_text())
    return measurements | {WHOLE: spent}


def cpu_of_children() -> float:
    """Seconds of the processor of all that has ended below this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(name: str, step: str, measured: dict[str, list[dict[str, Any]]]) -> str:
    seconds, scores = {}, {}
    for which, runs in measured.items():
        seconds[which] = median(taken(one, step) for one in runs)
        scores[which] = runs[-1]["scores"]
    cells = [f"{seconds['before']:.0f}", f"{seconds['after']:.0f}", f"{seconds['before'] / seconds['after']:.2f}"]
    cells += [f"{scores[which][score]:.4g}" for score in ("perplexity", "kl") for which in ("before", "after")]
    return f"| {name} | {step} | {' | '.join(cells)} |"


def taken(measurements: dict[str, Any], step: str) -> float:
    if step == WHOLE:
        return float(measurements[WHOLE])
    (notes,) = (one["notes"] for one in measurements["steps"] if one["step"] == step)
    return float(notes["cpu_seconds"])


if __name__ == "__main__":
    sys.exit(main())
