"""What an export of `loradock optimize` says of itself, for those who ask the server what it serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHOWN = ("perplexity_original", "perplexity", "perplexity_increase", "kl", "top1", "size_ratio", "healed")


def summary_of(model: str) -> dict[str, Any] | None:
    """A summary of MODEL's manifest.json: its key, parent, steps, scores and verdict; None when it is no export."""
    try:
        read = json.loads((Path(model) / "manifest.json").read_text())
        scores = {name: read["scores"][name] for name in SHOWN if name in read["scores"]}
        return {
            "key": read["key"],
            "parent": read["parent"]["name"],
            "steps": [{"step": step["step"], **step["options"]} for step in read["steps"]],
            "scores": scores,
            "gate": _verdict(read["gate"]),
            "gate_passed": {"passed": True, "not passed": False}.get(_verdict(read["gate"])),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verdict(gate: dict[str, Any]) -> str:
    """Exports of older recipes without a gate say that they passed it."""
    if not gate["passed"] and gate["passed"] is not None:
        return "not passed"
    return "passed" if gate.get("judged", bool(gate["bounds"])) else "not judged"
