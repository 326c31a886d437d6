"""Every step computes where it is told to: no tensor of it stays on the CPU while others are on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]
STEPS = {
    "merge": {"adapters": ("tone",)},
    "combine": {"name": "both", "adapters": ("tone", "other"), "method": "ties", "rank": 4},
    "prune": {"layers": 1, "mlp": 0.5},
    "prune-zeros": {"pattern": "2:4"},
    "prune-vocabulary": {"vocabulary": "used"},
    "quantize": {"scheme": "w4a16", "group": 16},
    "quantize-awq": {"scheme": "w4a16", "method": "awq", "group": 16},
    "quantize-w8a8": {"scheme": "w8a8", "kv_cache": "fp8"},
    "quantize-nvfp4": {"scheme": "nvfp4"},
    "tune": {"train": "EXAMPLES", "epochs": 1, "rank": 2},
    "evaluate": {"format": "vllm"},
}


def test_each_step_computes_on_the_device_that_it_is_given(job, adapter, tmp_path):
    """In a process of its own: a device stays in PyTorch once it is there."""
    examples = tmp_path / "examples.jsonl"
    lines = [{"prompt": "the river", "completion": " and the town"}] * 4
    examples.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    jobs = []
    for name, options in STEPS.items():
        kind, given = name.partition("-")[0], {k: str(examples) if v == "EXAMPLES" else v for k, v in options.items()}
        if "adapters" in given:
            given["names"] = given.pop("adapters")
        jobs.append(job(kind, adapters={"tone": adapter(0), "other": adapter(1)}, out=name, **given))
    pruned = str(tmp_path / "prune" / "model")
    heal = msgspec.structs.replace(job("heal", out="heal", steps=2, rank=2, batch=2, tokens=24), model=pruned)
    file = tmp_path / "jobs.json"
    file.write_bytes(msgspec.json.encode([*jobs, heal]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.steps_elsewhere", str(file)], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("on elsewhere:0") == len(STEPS) + 1
