"""An adapter on its way in, between its inspection and the registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.adapters.adapter import Inspection, Limits
from serve.adapters.conversion.conversion import Conversion
from serve.engine.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that was pushed, before anything is made of it; `model` is what its base served then."""

    base: Supervisor
    model: str
    limits: Limits
    inspection: Inspection
    digest: str
    id: str
    path: Path
    # If it came as another kind than LoRA.
    conversion: Conversion | None = None
    # What whoever pushed it should know.
    warning: str = ""
