"""Copies a trained adapter as it is shipped: its two files, the weights in bfloat16.

python -m serve.cli.demo.ship ./good serve/cli/demo/good
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from serve.adapters.adapter import CONFIG, WEIGHTS


def ship(trained: Path, folder: Path) -> None:
    """Write the adapter to the folder, in half of its bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained / CONFIG, folder / CONFIG)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    ship(*map(Path, sys.argv[1:]))
