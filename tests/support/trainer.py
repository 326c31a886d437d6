"""Stands at the edge for the program that trains: no model, the same folder, some bytes that depend on data and seed.

    python -m tests.support.trainer tune FOLDER
    python -m tests.support.trainer check FILE --method M --json        (the real one)
    python -m tests.support.trainer validate FOLDER --model M --json

STAND_IN in the environment, as JSON: `seconds` a step, `die` (exit code by step, negative for a signal, once), `hang`
(after this step), `hold` (it waits behind its first step while this file is there), `error`, `nothing` (the adapter
changes nothing), `rank`, `validation` (the report on the adapter).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import yaml

COMMAND = (sys.executable, "-m", "tests.support.trainer")
HIDDEN, LAYERS = 16, 2


class Trainer:
    def __init__(self, folder: Path) -> None:
        self.folder, self.how = folder, json.loads(os.environ.get("STAND_IN", "{}"))
        self.recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        self.step = self.recipe["steps"][0]["tune"]
        self.data = (folder / self.step["train"]).read_bytes()
        self.stopped = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopped = True

    def run(self) -> int:
        (self.folder / "error.json").unlink(missing_ok=True)
        if (self.folder / "adapter").is_dir():
            return 0
        if "error" in self.how:
            (self.folder / "error.json").write_text(json.dumps({"message": self.how["error"], "code": 1}))
            return 1
        examples = len(self.data.splitlines())
        epochs, batch = self.step.get("epochs", 3), self.step.get("batch", 10)
        each = -(-examples // batch)
        settings = {"epochs": epochs, "batch": batch, "learning_rate": 2e-4, "rank": self.how.get("rank", 2)}
        (self.folder / "settings.json").write_text(json.dumps(settings))
        state = self.folder / "state"
        done = int(state.read_text()) if state.is_file() else 0
        for step in range(done + 1, epochs * each + 1):
            time.sleep(self.how.get("seconds", 0.0))
            while step > 1 and not self.stopped and os.path.exists(self.how.get("hold", "")):
                time.sleep(0.02)
            if step == self.how.get("hang"):
                time.sleep(3600)
            if (code := self.how.get("die", {}).get(str(step))) is not None and not (self.folder / "died").exists():
                (self.folder / "died").touch()
                os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
            checkpoint = f"checkpoints/step-{step:06d}" if step % each == 0 else None
            if checkpoint:
                self._write(self.folder / checkpoint, step // each)
            self._tell(step, epochs * each, step / each, checkpoint)
            self._save(state, step)
            if self.stopped:
                return 4
        if "validation" in self.how:
            (self.folder / "validation.json").write_text(json.dumps(self.how["validation"]))
        self._write(self.folder / "adapter.part", epochs)
        (self.folder / "adapter.part").rename(self.folder / "adapter")
        return 0

    def _tell(self, step: int, steps: int, epoch: float, checkpoint: str | None) -> None:
        loss = 2.0 / step
        line = {
            "step": step, "steps": steps, "epoch": epoch, "train_loss": loss, "train_accuracy": 1 - loss / 4,
            "valid_loss": loss + 0.1 if checkpoint and "validation" in self.step else None, "valid_accuracy": None,
            "tokens": 100 * step, "seconds": 0.1 * step, "seconds_left": 0.1 * (steps - step), "checkpoint": checkpoint,
        }  # fmt: skip
        with (self.folder / "progress.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, state: Path, step: int) -> None:
        state.with_suffix(".part").write_text(str(step))
        state.with_suffix(".part").rename(state)

    def _write(self, folder: Path, epochs: int) -> None:
        """An adapter for the tiny model."""
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.how.get("rank", 2)
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        digest = hashlib.sha256(self.data).hexdigest()
        lots = random.Random(f"{digest} {self.recipe['seed']} {epochs} {self.recipe.get('adapters')}")
        head: dict[str, Any] = {}
        body = b""
        for layer in range(LAYERS):
            for name, shape in (("lora_A", (rank, HIDDEN)), ("lora_B", (HIDDEN, rank))):
                scale = 0.0 if name == "lora_B" and self.how.get("nothing") else 1.0
                numbers = [scale * lots.gauss(0, 1) for _ in range(rank * HIDDEN)]
                data = struct.pack(f"<{len(numbers)}f", *numbers)
                key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}.weight"
                head[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
                body += data
        header = json.dumps(head).encode()
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)


if __name__ == "__main__":
    if sys.argv[1] == "tune":
        sys.exit(Trainer(Path(sys.argv[2])).run())
    if sys.argv[1] == "validate":
        print(json.dumps(json.loads(os.environ["STAND_IN"])["validation"]))
        sys.exit(0)
    from optimize.cli import run

    sys.exit(run(sys.argv[1:], lambda name: Path(name)))
