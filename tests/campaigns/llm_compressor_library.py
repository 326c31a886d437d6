"""GPTQ as the package llmcompressor carries it, for `tests.campaigns.four_bits`; run by a Python that has it.

    python llm_compressor_library.py MODEL WINDOWS OUT GROUP OBSERVER SEED

WINDOWS is a JSON list of windows of token ids, as many for each. OUT becomes a checkpoint in 4 bits, symmetric, in
groups of GROUP, with OBSERVER's scales (`mse`, or `minmax`), all else by the package's defaults. The last line of the
output is its processor seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    model, windows, out, group, observer, seed = sys.argv[1:]
    torch: Any = importlib.import_module("torch")
    datasets: Any = importlib.import_module("datasets")
    package: Any = importlib.import_module("llmcompressor")
    gptq: Any = importlib.import_module("llmcompressor.modifiers.gptq")
    torch.manual_seed(int(seed))
    given = json.loads(Path(windows).read_text())
    rows = {"input_ids": given, "attention_mask": [[1] * len(window) for window in given]}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
    layers = {"targets": ["Linear"], "weights": weights | {"observer": observer}}
    begun = time.process_time()
    package.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict(rows),
        recipe=gptq.GPTQModifier(config_groups={"group_0": layers}, ignore=["lm_head"]),
        max_seq_length=len(given[0]),
        num_calibration_samples=len(given),
        batch_size=8,
        output_dir=out,
    )
    print(f"\n{time.process_time() - begun}")


if __name__ == "__main__":
    main()
