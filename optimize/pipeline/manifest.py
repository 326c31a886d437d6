"""`manifest.json` of an export: its sources, steps, scores and files, which `loradock serve` shows.

Every run of the same recipe writes the same manifest: no times, no speeds, no paths. Those are in
report/measurements.json.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from optimize import processor
from optimize.checkpoint import artifact
from optimize.errors import Refused
from optimize.options import plain
from optimize.pipeline import step_code
from optimize.pipeline.facts import Done, Facts
from optimize.pipeline.gate import TIMED
from optimize.steps.kind import kinds

NAME = "manifest.json"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "compressed-tensors",
    "safetensors",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "lm-eval",
)
TIMED_SCORES = ("engine", "speed_1", "speed_16", "speed_1_spread", "speed_16_spread")


def write(folder: Path, facts: Facts) -> None:
    """manifest.json and a model card in `folder`, over what lies there by now."""
    files = {name: digest for name, digest in artifact.contents(folder).items() if not name.startswith("report/")}
    parent = Path(facts.plan.model).name
    recipe = {name: value for name, value in plain(facts.recipe).items() if name not in ("output", "adapters", "steps")}
    # A hub id, or the name of one that comes along, is what others find it by; of a folder its name alone is told.
    recipe["model"] = parent if Path(facts.recipe.model).is_dir() else facts.recipe.model
    recipe["adapters"] = sorted(facts.recipe.adapters)
    recipe["evaluate"]["tasks"] = [Path(name).name for name in recipe["evaluate"]["tasks"]]
    own = recipe["evaluate"]["adapter_texts"]
    own |= {name: Path(where).name for name, where in own.items() if not where.startswith("hf:")}
    for section in ("calibration", "evaluate"):
        source = recipe[section]["text"]
        recipe[section]["text"] = source if source.startswith("hf:") else Path(source).name
    body = {
        "manifest_version": 1,
        "key": facts.plan.key,
        "parent": {"name": parent, "files": facts.plan.inputs["model"]},
        "adapters": facts.plan.inputs["adapters"],
        "texts": facts.plan.texts,
        "recipe": recipe,
        "steps": [
            {"step": done.kind, "options": _named(done), "notes": _lasting(done.notes)}
            for done in facts.done
            if done.kind not in ("evaluate", "engine", "tasks")
        ],
        "versions": versions(),
        "arithmetic": {
            **processor.arithmetic(),
            "code": {done.kind: step_code.of(done.kind, done.options) for done in facts.done},
        },
        "scores": {name: value for name, value in facts.scores.items() if name not in TIMED_SCORES},
        "gate": {
            "judged": facts.judged,
            "passed": facts.passed if facts.judged or not facts.passed else None,
            "bounds": [
                {**verdict.plain(), "measured": None if verdict.bound in TIMED else verdict.measured}
                for verdict in facts.verdicts
            ],
        },
        "files": files,
    }
    (folder / "README.md").write_text(_card(facts, parent))
    body["files"]["README.md"] = artifact.digest(folder / "README.md")
    (folder / NAME).write_text(json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def of(folder: Path) -> dict[str, Any]:
    """The manifest of an export, or nothing."""
    try:
        read = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def whole(folder: Path) -> dict[str, Any]:
    """The same, or Refused where a file of that name is no manifest of ours."""
    if not (folder / NAME).exists():
        return {}
    read = of(folder)
    if missing := [name for name in schema()["required"] if name not in read]:
        raise Refused(
            f"{folder / NAME} is none that `loradock optimize` wrote, or not all of it: it lacks {missing[0]}. "
            "Fetch the export again; if it is another program's, move it away and say --model and --expect"
        )
    return read


def judged(read: dict[str, Any]) -> bool:
    """Whether a manifest's recipe had a gate."""
    gate = read.get("gate") or {}
    return bool(gate.get("judged", gate.get("bounds")))


def schema() -> dict[str, Any]:
    """The manifest's JSON schema."""
    read: dict[str, Any] = json.loads((resources.files("optimize") / "manifest.schema.json").read_text())
    return read


@cache
def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            pass
    return installed


def _lasting(notes: dict[str, Any]) -> dict[str, Any]:
    """A step's notes without what differs from run to run."""
    return {
        name: value
        for name, value in notes.items()
        if name not in ("seconds", "cpu_seconds", "training_seconds", "memory", "scores", "losses")
    }


def _named(done: Done) -> dict[str, Any]:
    """A step's options, with files by their names alone."""
    files = kinds()[done.kind].options.files if done.kind in kinds() else ()
    return done.options | {name: Path(done.options[name]).name for name in files}


def _card(facts: Facts, parent: str) -> str:
    library = {"vllm": "transformers", "adapter": "peft", "gguf": "gguf"}.get(facts.recipe.export.format, "onnx")
    lines = ["---", f"base_model: {parent}", f"library_name: {library}", "tags: [loradock]", "---", ""]
    lines += [f"# {parent}, optimized", "", f"Made from {parent} by `loradock optimize`: {_steps(facts)}."]
    lines += ["", f"| | {facts.original} | this |", "|---|---|---|"]
    scores = facts.scores
    if "valid_loss" in scores:
        lines.append(f"| held-out loss | {scores['valid_loss_before']:.3f} | {scores['valid_loss']:.3f} |")
    if "perplexity" in scores:
        lines.append(
            f"| perplexity, held-out text | {scores['perplexity_original']:.2f} | {scores['perplexity']:.2f} |"
        )
        if "perplexity_base" in scores:
            lines.append(f"| the same, of {parent} alone | {scores['perplexity_base']:.2f} | |")
        lines.append(f"| same likeliest token | | {scores['top1']:.1%} |")
        lines.append(f"| weights, MB | {scores['bytes_original'] / 1e6:.0f} | {scores['bytes'] / 1e6:.0f} |")
    lines += [
        "",
        f"Gate: {facts.verdict}.",
        "",
        "Everything else is in manifest.json.",
    ]
    return "\n".join(lines) + "\n"


def _steps(facts: Facts) -> str:
    shown = [done.kind for done in facts.done if done.kind not in ("evaluate", "engine", "tasks")]
    return ", ".join(shown) or "no step"
