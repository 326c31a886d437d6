"""A Llama of two small layers with real weights files, a tokenizer of its own, and adapters that PEFT made for it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimize.errors import OptimizeError
from tests.support import pico

# Small matrices: threads that wait for one another would cost more than the arithmetic, here and in the children.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# What torch compiles is kept by what it computes, whatever the processor has or is told to have: a kernel for another
# one writes behind its arrays.
_has = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))]
_processor = hashlib.sha256("".join(_has[:1]).encode()).hexdigest()[:12]
_told = os.environ.get("ATEN_CPU_CAPABILITY", "any")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor-{os.getuid()}-{_processor}-{_told}")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return pico.tokenizer()


@pytest.fixture(scope="session")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, briefly trained on the text below, so that what is taken from it is missed."""
    import torch

    folder = tmp_path_factory.mktemp("pico") / "pico"
    model = pico.model(tokenizer)
    ids = torch.tensor([tokenizer(line).input_ids[:48] for line in sentences(0, 64)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(seed: int, count: int) -> list[str]:
    """Lines of 48 words with an order that can be learned: each word is followed by one of two."""
    import random

    dice = random.Random(seed)
    words = list(dict.fromkeys(pico.WORDS))
    lines = []
    for _ in range(count):
        at = dice.randrange(len(words))
        line = []
        for _ in range(48):
            line.append(words[at])
            at = (at * 3 + dice.choice((1, 2))) % len(words)
        lines.append(" ".join(line))
    return lines


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """calibration and evaluation as .jsonl files."""
    folder = tmp_path_factory.mktemp("texts")
    made = {}
    for name, seed in (("calibration", 1), ("evaluation", 2)):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(seed, 80)))
    return made


Adapter = Callable[..., Path]


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Make an adapter for the base; every tensor of it is random and not zero."""

    def make(seed: int = 0, **options: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **options}
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("lora_" in name or "modules_to_save" in name):
                noise = torch.randn_like(parameter) * 0.05
                parameter.data = parameter.data * 1.1 if "magnitude" in name else parameter.data + noise
        folder = tmp_path_factory.mktemp("adapter") / "adapter"
        wrapped.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def written(tmp_path: Path, base: Path, texts: dict[str, Path]) -> Callable[[str], Path]:
    """A recipe file over the pico model with the steps that are given."""

    def write(more: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"model: {base}\n"
            f"calibration: {{text: {texts['calibration']}, samples: 16, tokens: 48}}\n"
            f"evaluate: {{text: {texts['evaluation']}, samples: 8, tokens: 48, engine: false, prompts: [the river]}}\n"
            + more
        )
        return file

    return write


@pytest.fixture
def job(tmp_path: Path, base: Path, texts: dict[str, Path]) -> Callable[..., Any]:
    """The job of a step over the pico model."""
    import msgspec

    from optimize.job import Job
    from optimize.options import Evaluate, Text
    from optimize.steps.kind import kinds

    def make(
        kind: str, model: Path = base, adapters: dict[str, Path] | None = None, out: str = "out", **options: Any
    ) -> Job:
        if "names" in options:
            options["adapters"] = tuple(options.pop("names"))
        defaults = msgspec.to_builtins(kinds()[kind].options(**options)) if kind in kinds() else options
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        return Job(
            kind=kind, options=defaults, model=str(model), base=str(base), reference=str(base),
            adapters={name: str(path) for name, path in (adapters or {}).items()},
            originals={name: str(path) for name, path in (adapters or {}).items()},
            calibration=Text(text=str(texts["calibration"]), samples=16, tokens=48),
            evaluate=Evaluate(text=str(texts["evaluation"]), samples=8, tokens=48, prompts=("the river",)),
            seed=0, target="cpu", out=str(folder),
        )  # fmt: skip

    return make


def silent(*_: Any) -> None:
    """A progress that nobody watches."""


@pytest.fixture
def steps_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps compute in this process: a process of its own costs each three seconds of imports. For tests of what a run
    decides of its steps; how their processes are run and ended, test_run.py shows with real ones.
    """
    from optimize.pipeline import child, worker

    def run(self: child.Child, job: Any) -> dict[str, Any]:
        try:
            notes = importlib.import_module(worker.work(job.kind)).run(job, silent)
        except OptimizeError as error:
            raise type(error)(f"{job.kind}: {error.message}") from error
        return {**notes, "memory": 0, "cpu_seconds": 0.0}

    monkeypatch.setattr(child.Child, "run", run)
