"""How long the engine works, and for whom.

A step takes as long as it takes for all sequences in it together. Its time is divided among them by the tokens that it
computed for each: one for a sequence that goes on, and what of the prompt was not cached for one that begins. So the
parts add up to the engine's busy time. A prompt that is computed in several steps is charged for those in which nothing
else was answered, and for its last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol


class Charged(Protocol):
    """Somebody's sequence."""

    engine_seconds: float


@dataclass(slots=True)
class StepTimes:
    """`busy` and `background` in seconds: all steps, and what of them was for the server's own requests.

    vLLM shows a step in one or more slices of its outputs, and says afterwards which of its engines took it.
    """

    busy: float = 0.0
    background: float = 0.0
    # By engine: when its last step ended, by the clock of its process.
    _ended: dict[int, float] = field(default_factory=dict)
    _computed: list[tuple[Charged | None, int]] = field(default_factory=list)
    _scheduled: float = math.inf
    _until: float = 0.0

    def computed(self, states: list[tuple[Any, int]], until: float) -> None:
        """A slice of a step that ended at `until`: vLLM's states of its sequences, with the tokens of each."""
        self._until = until
        for state, tokens in states:
            self._computed.append((state.watched, tokens))
            if state.stats is not None and state.stats.scheduled_ts < self._scheduled:
                self._scheduled = state.stats.scheduled_ts

    def ended(self, engine: int = 0) -> None:
        """The step is over: it began when the one before it ended, or when its first sequence had its turn."""
        if not self._computed:
            return
        computed, self._computed = self._computed, []
        began, self._scheduled = max(self._ended.get(engine, 0.0), self._scheduled), math.inf
        self._ended[engine] = self._until
        seconds = max(0.0, self._until - began) if began < math.inf else 0.0
        self.busy += seconds
        share = seconds / sum(tokens for _, tokens in computed)
        for sequence, tokens in computed:
            if sequence is None:
                self.background += tokens * share
            else:
                sequence.engine_seconds += tokens * share
