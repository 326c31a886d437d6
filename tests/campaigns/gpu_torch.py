"""`loradock optimize` on a GPU against the same on the machine's processor: on a machine with torch, and without vLLM.

    python -m tests.campaigns.gpu_torch --out FOLDER [--size 300M|1B] [--part NAME ...] [--wheels FOLDER] [--rehearse]

Each part takes some minutes at most and is one recipe, run with `device: cuda` and with `device: cpu`: seconds of the
step, and whether the scores are the same. The model is made on the spot, of random weights. No network: what this
Python lacks of loradock's own needs comes from a folder of wheels (`make gpu-torch-wheels`, some MB), and no vLLM is
needed. `--rehearse` runs the processor's half twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.campaigns import gpu_results
from tests.campaigns.gpu_results import ROOT

STEPS: Mapping[str, dict[str, Any]] = {
    "quantize-fp8": {"quantize": {"scheme": "fp8"}},
    "quantize-w8a8": {"quantize": {"scheme": "w8a8"}},
    "quantize-w4a16": {"quantize": {"scheme": "w4a16"}},
    "quantize-awq": {"quantize": {"scheme": "w4a16", "method": "awq"}},
    "quantize-nvfp4": {"quantize": {"scheme": "nvfp4"}},
    "prune": {"prune": {"layers": 1, "mlp": 0.75}},
    "tune": {"tune": {"train": "EXAMPLES", "validation": "HELD_OUT", "epochs": 1, "rank": 8, "name": "tone"}},
}
# The command, without the server that it is a part of.
OPTIMIZE = "import sys; from pathlib import Path; from optimize.cli import run; sys.exit(run(sys.argv[1:], Path))"
COMPARED = ("perplexity", "kl", "top1", "valid_loss")


@dataclass(frozen=True)
class Machine:
    work: Path
    size: str
    device: str  # torch's name of what is measured

    @property
    def described(self) -> str:
        import torch

        name = torch.cuda.get_device_name(0) if self.device == "cuda" else "a rehearsal on a CPU"
        cores = len(os.sched_getaffinity(0))
        return f"{name}, torch {torch.__version__}, {cores} cores, a random Llama of size {self.size}"

    @cached_property
    def model(self) -> Path:
        from tests.campaigns.random_model import random_model
        from tests.support import plain_words

        words = made(self.work / "words", plain_words.base)
        return words if self.size == "tiny" else made(self.work / self.size, partial(random_model, self.size, words))

    def recipe(self, name: str, device: str) -> Path:
        calibration, evaluation = gpu_results.texts(self.work)
        examples = self.work / "examples.jsonl"
        lines = [
            json.dumps({"prompt": f"the river {number}", "completion": " ran past a town"}) for number in range(64)
        ]
        held_out = examples.with_name(f"held-out-{examples.name}")
        part = max(10, len(lines) // 5)
        examples.write_text("\n".join(lines[part:]) + "\n")
        held_out.write_text("\n".join(lines[:part]) + "\n")
        steps = json.dumps([STEPS[name]]).replace("EXAMPLES", str(examples)).replace("HELD_OUT", str(held_out))
        recipe = {
            "model": str(self.model),
            "target": "gpu",
            "device": self.device if device == "cuda" else "cpu",
            "steps": json.loads(steps),
            "calibration": {"text": str(calibration), "samples": 8, "tokens": 128},
            "evaluate": {"text": str(evaluation), "samples": 8, "tokens": 128, "engine": False, "prompts": []},
        }
        file = self.work / f"{name}-{device}.yaml"
        file.write_text(json.dumps(recipe))
        return file


def made(folder: Path, make: Any) -> Path:
    """The folder, made if it is not there; it appears whole."""
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}.part")
        make(aside)
        aside.rename(folder)
    return folder


def compare(machine: Machine, name: str) -> Mapping[str, str]:
    """One recipe on both devices."""
    found = {
        device: optimized(machine.recipe(name, device), machine.work / f"{name}-{device}") for device in ("cuda", "cpu")
    }
    seconds = [sum(step["notes"].get("seconds", 0) for step in found[device]["steps"]) for device in ("cuda", "cpu")]
    scores = [found[device]["scores"] for device in ("cuda", "cpu")]
    same = ", ".join(
        f"{score} {one[score]:.5g} and {other[score]:.5g}"
        for score in COMPARED
        for one, other in [scores]
        if isinstance(one.get(score), int | float)
    )
    row = f"{seconds[0]:.1f} and {seconds[1]:.1f} s; {same or 'no scores'}"
    return {f"{name}, on the device and on the processor": row}


def optimized(recipe: Path, out: Path) -> dict[str, Any]:
    """The measurements of a run; one that does not pass a gate has them too."""
    if not (reports := _reports(out)):
        command = [sys.executable, "-c", OPTIMIZE, str(recipe), "--out", str(out), "--resume"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, text=True, capture_output=True, check=False)
        if not (reports := _reports(out)):
            said = f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
            raise RuntimeError(f"{recipe.name} ended with {done.returncode}:\n{said}")
    found: dict[str, Any] = json.loads(reports[0].read_text())
    return found


def _reports(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}*/**/measurements.json"))


def with_wheels(folder: Path, work: Path) -> None:
    """Run this again over what the wheels hold."""
    site = work / "site"
    wheels = sorted(map(str, folder.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), *wheels]
    subprocess.run(command, check=True, stdout=sys.stderr)
    paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    words = [word for word in sys.argv[1:] if word not in ("--wheels", str(folder))]
    os.execv(sys.executable, [sys.executable, "-m", "tests.campaigns.gpu_torch", *words])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".campaigns/gpu-torch")))
    parser.add_argument("--size", choices=["300M", "1B"], default="300M")
    parser.add_argument("--part", action="append", choices=list(STEPS))
    parser.add_argument("--wheels", type=Path, help="what this Python lacks, as `make gpu-torch-wheels` fetches it")
    parser.add_argument("--part-seconds", type=float, default=gpu_results.LONGEST, help="0: as long as it takes")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, and the processor in the GPU's place")
    parser.add_argument("--work", type=Path, default=Path("/tmp/loradock-gpu-torch"), help="where the models are made")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.wheels:
        with_wheels(given.wheels, given.work)
    import torch

    if not given.rehearse and not torch.cuda.is_available():
        print("torch finds no GPU here: --rehearse runs everything but the device")
        return 2
    machine = Machine(given.work, "tiny", "cpu") if given.rehearse else Machine(given.work, given.size, "cuda")
    parts = {name: partial(compare, machine, name) for name in STEPS}
    return gpu_results.run(parts, given.part or (), given.out, machine.described, "make gpu-torch", given.part_seconds)


if __name__ == "__main__":
    sys.exit(main())
