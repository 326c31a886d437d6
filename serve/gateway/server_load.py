"""What this server has to do and what it holds, as it tells the other servers of its fleet."""

from __future__ import annotations

from serve.engine.engine import Phase
from serve.engine.fleet import Fleet
from serve.fleet.membership import Report


class ServerLoad:
    """Over all engines of this server."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def load(self) -> float:
        """Requests of clients that are under way, and that wait."""
        return float(sum(base.leases - base.background for base in self._fleet))

    @property
    def seats(self) -> float:
        """Requests that it works on at a time."""
        return max(1.0, float(sum(base.backend.seats for base in self._fleet if _serves(base.phase))))

    def report(self) -> Report | None:
        """None while an engine does not serve."""
        if not all(_serves(base.phase) for base in self._fleet):
            return None
        backends = [base.backend for base in self._fleet]
        held = [residence.id.rpartition("@")[0] for base in self._fleet for residence in reversed(base.residents)]
        return Report(
            slots=sum(backend.max_resident for backend in backends),
            max_rank=min(backend.max_lora_rank for backend in backends),
            load=self.load,
            held=tuple(dict.fromkeys(held)),
        )


def _serves(phase: Phase) -> bool:
    return phase is Phase.READY
