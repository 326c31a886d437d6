"""Everything that was never measured on a GPU, in one campaign for any machine that has one, without a network.

    python -m tests.campaigns.gpu --out FOLDER [--size 1B|8B] [--part NAME ...] [--rehearse]

Its parts take some minutes each; what a part found is in FOLDER/PART.json as soon as it has ended, and is not measured
again, so the campaign goes on where it was stopped: on the same machine, for the same size. FOLDER/table.md is the
table for the docs. Models are made on the spot, of random weights: speed, recovery and equality are theirs as they are
any model's, quality against the original is a comparison of formats and no promise for a trained model. `--rehearse`
runs all of it but the device, on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from tests.campaigns import gpu_parts, gpu_results
from tests.campaigns.gpu_parts import Machine


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".campaigns/gpu")))
    parser.add_argument("--size", choices=["1B", "8B"], default="1B")
    parser.add_argument("--part", action="append", choices=list(gpu_parts.PARTS))
    parser.add_argument("--part-seconds", type=float, default=gpu_results.LONGEST, help="0: as long as it takes")
    parser.add_argument("--rehearse", action="store_true", help="everything but the device, on a CPU")
    parser.add_argument("--work", type=Path, default=Path("/tmp/loradock-gpu"), help="where the models are made")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    machine = Machine.here(given.work, "tiny" if given.rehearse else given.size, given.rehearse)
    if not machine.gpu and not given.rehearse:
        print("there is no GPU here, or vLLM's CPU build is installed: --rehearse runs everything but the device")
        return 2
    parts = {name: partial(part, machine) for name, part in gpu_parts.PARTS.items()}
    return gpu_results.run(parts, given.part or (), given.out, machine.described, "make gpu", given.part_seconds)


if __name__ == "__main__":
    sys.exit(main())
