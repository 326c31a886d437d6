"""An engine whose answers differ a little from reading to reading, as a GPU's do: bfloat16's logits step by .125, and a
batch's size chooses the kernels. Adapters are named by how many nats they move every log-probability."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serve.drift.baseline import Baseline, Provenance
from serve.drift.probe_comparison import ProbeAnswers
from serve.drift.watched_version import DriftSettings, WatchedVersion
from serve.engine.effect_probe import FIXED, Logprobs, Probe
from serve.errors import AdapterRejected

TOKENS = 20
STEP = 0.125
# Of two normal values that are 1 wide: how far apart they are on average.
APART = 2 / math.sqrt(math.pi)
# Batches that kernels are chosen by, idle or beside so many requests of others.
SIZES = 6
# Of a version after a restart, one an hour.
READINGS = 4
KINDS = ("free", "steps", "batch")


class Rounding:
    """Two readings of the same question differ by `nats` on average, over all its tokens.

    kind: "free", each value by itself and anew each time; "steps", logits that moved so little are rounded to steps of
    .125; "batch", what moves is the same in every batch of the same size. `moved`: by how many nats this start's
    kernels differ from another's, of the base; an adapter adds as much of its own.
    """

    def __init__(self, nats: float, seed: int, kind: str = "free", moved: float = 0.0, start: int = 0) -> None:
        self.random = random.Random(f"{seed} {start}")
        self.kind, self.seed, self.start = kind, seed, start
        self.width, self.offset = nats / APART, moved / APART
        model = random.Random(seed)
        self.logits = {prompt: [model.gauss(12, 2) for _ in range(TOKENS)] for prompt in FIXED}
        self.signs = {prompt: [model.choice((-1, 1)) for _ in range(TOKENS)] for prompt in FIXED}
        self.backend = self
        self._known: dict[tuple[str | None, str], list[float]] = {}
        self._draws: dict[str, list[float]] = {}

    @asynccontextmanager
    async def lease(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(watched=lambda watch: nullcontext())

    async def probe(self, adapter_id: str | None, prompts: Sequence[str]) -> list[Logprobs]:
        others = self.random.randrange(SIZES)  # beside traffic: whatever the others' number makes of it
        return [self._answer(adapter_id, prompt, (len(prompts) + others) % SIZES) for prompt in prompts]

    async def one_by_one(self, adapter_id: str | None) -> list[Logprobs]:
        """What a version is asked every hour."""
        return [logprobs for prompt in FIXED for logprobs in await self.probe(adapter_id, [prompt])]

    async def score(self, adapter_id: str | None, text: str) -> float:
        return -3.0

    def _answer(self, adapter_id: str | None, prompt: str, size: int) -> Logprobs:
        means = self._means(adapter_id, prompt)
        if self.kind == "batch":
            moves = self._drawn(f"{adapter_id} {prompt} {size}", self.width)
        else:
            moves = [self.random.gauss(0, self.width) for _ in range(TOKENS)]
        logits = [mean + move for mean, move in zip(means, moves, strict=True)]
        if self.kind == "steps" and self.width:
            logits = [round(logit / STEP) * STEP for logit in logits]
        # Less the sum over the vocabulary, of which these tokens are a part that hardly moves.
        return {token: logit - 20.0 for token, logit in enumerate(logits)}

    def _means(self, adapter_id: str | None, prompt: str) -> list[float]:
        """Logits without what differs from reading to reading."""
        if (adapter_id, prompt) not in self._known:
            effect = float(adapter_id or 0)
            kernels = self._drawn(f"base {prompt}", self.offset)
            own = self._drawn(f"{adapter_id} {prompt}", self.offset) if adapter_id else [0.0] * TOKENS
            parts = zip(self.logits[prompt], self.signs[prompt], kernels, own, strict=True)
            self._known[adapter_id, prompt] = [logit + effect * sign + one + two for logit, sign, one, two in parts]
        return self._known[adapter_id, prompt]

    def _drawn(self, what: str, width: float) -> list[float]:
        """The same for the same question of this start."""
        if what not in self._draws:
            drawn = random.Random(f"{self.seed} {self.start} {what}") if width else None
            self._draws[what] = [drawn.gauss(0, width) if drawn else 0.0 for _ in range(TOKENS)]
        return self._draws[what]


async def admitted(nats: float, kind: str, moves: str, seeds: Iterable[int], min_effect: float = 0.08) -> int:
    """How many of so many adapters that move the base by `moves` are taken, each by an engine of its own."""
    count = 0
    for seed in seeds:
        probe = Probe(Rounding(nats, seed, kind), min_effect=min_effect)
        await probe.start()
        try:
            await probe.judge(moves, Path())
        except AdapterRejected:
            continue
        count += 1
    return count


async def alarms(nats: float, kind: str, then: str, seeds: Iterable[int], moved: float = 0.0) -> int:
    """How many versions that moved the base by .2, and move it by `then` after a restart, raise an alarm of drift.

    They are asked and compared as the server does it, `READINGS` times.
    """
    count, provenance = 0, Provenance("tone", "v1", "of a test", "")
    for seed in seeds:
        version = WatchedVersion("tone", "v1", "tone@1", "base", Baseline(provenance), DriftSettings())
        raised = 0
        for start, (moves, readings) in enumerate((("0.2", 1), (then, READINGS))):
            engine = Rounding(nats, seed, kind, moved, start)
            probe = Probe(engine)
            await probe.start()
            base = await engine.one_by_one(None)
            earlier = None
            for _ in range(readings):
                answers = ProbeAnswers(await engine.one_by_one(moves), base, probe.noise)
                result = version.compare_probe(answers, 0.0)
                if result.ask_again:
                    earlier, answers = answers, ProbeAnswers(await engine.one_by_one(moves), base, probe.noise)
                    result = version.compare_probe(answers, 0.0, earlier)
                raised += result.alarm is not None
        count += bool(raised)
    return count
