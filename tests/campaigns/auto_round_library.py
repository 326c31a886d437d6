"""AutoRound as the package auto-round carries it, for `tests.campaigns.four_bits`; run by a Python that has it.

    python auto_round_library.py MODEL WINDOWS OUT GROUP ITERATIONS SEED

WINDOWS is a JSON list of windows of token ids, as many for each. OUT becomes a checkpoint in 4 bits, symmetric, in
groups of GROUP, all else by the package's defaults. The last line of the output is its processor seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    model, windows, out, group, iterations, seed = sys.argv[1:]
    torch: Any = importlib.import_module("torch")
    package: Any = importlib.import_module("auto_round")
    given = [torch.tensor([window]) for window in json.loads(Path(windows).read_text())]
    begun = time.process_time()
    rounding = package.AutoRound(
        model,
        scheme="W4A16",
        group_size=int(group),
        iters=int(iterations),
        seed=int(seed),
        dataset=given,
        nsamples=len(given),
        seqlen=given[0].shape[-1],
        device_map="cpu",
    )
    rounding.quantize_and_save(out, format="auto_round")
    print(f"\n{time.process_time() - begun}")


if __name__ == "__main__":
    main()
