"""What a loop says of canaries: that of its try is its own, and so is what follows from a verdict on it."""

from __future__ import annotations

from serve.events import CanaryVerdict
from serve.loop.loop_rows import LoopRows
from serve.loop.objects import Phase
from serve.rollout.canary.registered_analyses import RegisteredAnalyses
from serve.sequential.sequential_test import Verdict


class LoopTries:
    """As the database has them; all of it blocks. `analyses` are those of canaries, on every server."""

    def __init__(self, rows: LoopRows, analyses: RegisteredAnalyses) -> None:
        self._rows = rows
        self._analyses = analyses

    def alpha(self, name: str) -> float:
        """What a false verdict on the adapter's canary may cost, if it is its loop's; else 1."""
        loop = self._rows.get(name)
        # In every phase: a person may have given the candidate its share before its loop does.
        return 1.0 if loop is None or loop.phase is Phase.WAITING else loop.state.alpha

    def begin(self, name: str, live: int, canary: int) -> float:
        """The part of that, or of its policy's alpha, that the analysis which begins here may spend."""
        return self._analyses.register(name, live, canary)

    def is_candidate(self, name: str, version: int) -> bool:
        """The try that goes on has trained this version, on answers that the live one does not give."""
        loop = self._rows.get(name)
        return loop is not None and loop.phase is not Phase.WAITING and loop.state.candidate == version

    def heard(self, verdict: CanaryVerdict) -> bool:
        """Note the verdict on a canary; whether the loop acts on it, and nobody else."""
        loop = self._rows.get(verdict.adapter)
        if loop is None or loop.phase not in (Phase.CANARY, Phase.ASKING) or loop.state.candidate != verdict.canary:
            return False
        said = {"verdict": verdict.verdict.value, "reason": verdict.reason, "evidence": verdict.evidence}
        self._rows.hear(loop, said)
        if loop.phase is Phase.CANARY or verdict.verdict is Verdict.WORSE:
            self._rows.look(loop)
        return verdict.verdict is Verdict.PROVED
