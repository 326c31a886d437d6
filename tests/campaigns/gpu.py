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
import json
import os
import platform
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.campaigns import gpu_parts
from tests.campaigns.gpu_parts import Machine


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".campaigns/gpu")))
    parser.add_argument("--size", choices=["1B", "8B"], default="1B")
    parser.add_argument("--part", action="append", choices=list(gpu_parts.PARTS))
    parser.add_argument("--rehearse", action="store_true", help="everything but the device, on a CPU")
    parser.add_argument("--work", type=Path, default=Path("/tmp/loradock-gpu"), help="where the models are made")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    machine = Machine.here(given.work, "tiny" if given.rehearse else given.size, given.rehearse)
    if not machine.gpu and not given.rehearse:
        print("there is no GPU here, or vLLM's CPU build is installed: --rehearse runs everything but the device")
        return 2
    if others := [found["machine"] for found in measured(given.out).values() if found["machine"] != machine.described]:
        print(f"{given.out} holds what was measured on another machine or model ({others[0]}): say another --out")
        return 2
    failed = []
    for name in given.part or list(gpu_parts.PARTS):
        file = given.out / f"{name}.json"
        if file.is_file():
            print(f"{name}: measured before", flush=True)
            continue
        began = time.monotonic()
        try:
            found = gpu_parts.PARTS[name](machine)
        except Exception:  # the others are worth their time all the same
            traceback.print_exc()
            failed.append(name)
            continue
        seconds = round(time.monotonic() - began)
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps({"seconds": seconds, "machine": machine.described, "rows": found}, indent=1))
        aside.rename(file)
        print(f"{name}: {seconds} s", flush=True)
        (given.out / "table.md").write_text(table(given.out, machine))
    print(table(given.out, machine))
    if failed:
        print(f"not measured: {', '.join(failed)}; run it again", file=sys.stderr)
    return len(failed)


def measured(out: Path) -> dict[str, dict[str, Any]]:
    """What each part that has ended found, by its name."""
    files = {name: out / f"{name}.json" for name in gpu_parts.PARTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def table(out: Path, machine: Machine) -> str:
    """What all parts found so far, as the docs have it."""
    parts = measured(out)
    head = f"{machine.described}, {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}. `make gpu`."
    lines = [head, "", "| | found |", "|---|---|"]
    for name in gpu_parts.PARTS:
        rows = parts[name]["rows"] if name in parts else {name: "not measured"}
        lines += [f"| {what} | {value} |" for what, value in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
