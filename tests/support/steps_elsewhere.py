"""`python -m tests.support.steps_elsewhere JOBS.json`: each step on a device beside the CPU; its results are there."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import msgspec
import torch

from tests.support import second_device

DEVICE = second_device.made()  # before any step is imported

from optimize.job import Job  # noqa: E402
from optimize.pipeline.worker import work  # noqa: E402


def main(file: str) -> int:
    failed = 0
    for job in msgspec.json.decode(Path(file).read_bytes(), type=list[Job]):
        task = importlib.import_module(work(job.kind))
        try:
            task.run(msgspec.structs.replace(job, device=DEVICE), lambda *_: None)
            print(f"{Path(job.out).name} on {DEVICE}", flush=True)
        except Exception:
            failed += 1
            print(f"{Path(job.out).name}:", file=sys.stderr)
            traceback.print_exc()
        torch.set_default_device(None)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
