"""The layers that a killed run has rounded already: where its writer was, and what the next layer is called with."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimize.checkpoint import artifact
from optimize.checkpoint.checkpoint import Writer

SECONDS = 30.0  # between two writes, which take as long as the hidden states take to the disk


@dataclass(frozen=True, slots=True)
class Found:
    """`layers` are done, and the next one's hidden states are `states`, a batch each; the original's are `whole`."""

    layers: int
    mark: list[dict[str, Any]]
    states: list[torch.Tensor]
    whole: list[torch.Tensor]


class Kept:
    """One file, replaced as a whole; layers that were rounded at other levels do not count."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written_at = time.monotonic()

    def read(self, choice: list[list[str]], model: Path) -> Found | None:
        """What was rounded so, and written to the folder `model`."""
        if not self._file.is_file() or not model.is_dir():
            return None
        device = str(torch.get_default_device())
        with safe_open(self._file, "pt", device=device) as opened:
            said = json.loads(opened.metadata()["kept"])
            if said["choice"] != choice:
                return None
            states = [opened.get_tensor(f"{at}") for at in range(said["batches"] + said["whole"])]
        print(f"{said['layers']} layers are done already")
        return Found(said["layers"], said["mark"], states[: said["batches"]], states[said["batches"] :])

    def write(
        self,
        choice: list[list[str]],
        layers: int,
        states: list[torch.Tensor],
        whole: list[torch.Tensor],
        writer: Writer,
        last: bool,
    ) -> None:
        if not last and time.monotonic() - self._written_at < SECONDS:
            return
        said = {"choice": choice, "layers": layers, "batches": len(states), "whole": len(whole), "mark": writer.mark}
        tensors = {f"{at}": state.contiguous() for at, state in enumerate([*states, *whole])}
        with artifact.replaced(self._file) as out:
            save_file(tensors, out.name, {"kept": json.dumps(said)})
        self._written_at = time.monotonic()
