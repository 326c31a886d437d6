"""The effect probe: "loaded" means "it changes the output".

vLLM takes an adapter whose tensors reach no module, and answers with the plain base. So before a version is registered,
its next-token log-probabilities on a few fixed prompts are held against the base's: they must be finite, and differ
by more than the base differs from itself when its batch is another one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from serve.asgi.exchange import Watch
from serve.engine.payer import PROBES, Payer
from serve.errors import AdapterRejected

# Few and short: an upload waits for them (0.15 s on two cores for a 135M model; twice as many take twice as long). Of
# many kinds, since an adapter that was trained on one kind moves the others too.
PROMPTS = ("The capital of", "def add(a, b", "Dear customer,", "Once upon a")
# What every live version is asked every hour: prompts of many kinds, one token each.
FIXED = (
    *PROMPTS,
    "The largest planet is",
    "Water boils at",
    "import numpy as",
    "SELECT name FROM",
    "for i in range(",
    '{"name": "',
    "The patient was given",
    "The court held that",
    "Shares of the company",
    "To whom it may",
    "I am sorry, but",
    "Thank you for your",
    "Step 1:",
    "Question: Why is the sky blue? Answer:",
    "Translate to French: good morning ->",
    "2 + 2 =",
    "The opposite of hot is",
    "Monday, Tuesday,",
    "Es war einmal",
    "Bonjour, je m'appelle",
    "Roses are red,",
    "In 1969, astronauts",
    "The recipe needs flour,",
    "He opened the door and",
    "She said that she would",
    "The results show that",
    "# Introduction\n\n",
    "User: hello\nAssistant:",
)
TEXT = (
    "The harbour was quiet that morning, and the boats lay still beside the wall while the baker carried bread up the"
    " hill. Water boils at one hundred degrees at sea level and at a lower temperature in the mountains, because the"
    " air above presses less on its surface. When the meeting ended, the two sides agreed to publish the figures"
    " before the end of the month and to speak again in spring."
)
# Measured on SmolLM2-135M in bf16: on a CPU the base equals itself to the bit in any batch. A trained adapter moves
# 9 to 20; scaled to a twentieth .13; scaled to a thousandth, where all that is left of it is rounding, .04 to .07.
# How many times the base's difference from itself counts as an effect, where that is more than `min_effect`.
ABOVE_NOISE = 2.0
# Nats, and times the base's noise, below which an effect may be rounding: on a GPU a batch's size chooses the kernels,
# and bfloat16's logits step by .125. Then adapter and base are read side by side so many times, in batches of several
# sizes, and their means are compared; a trained adapter is far above, and does not wait.
DOUBTFUL = 0.25
NOISY = 4.0
ROUNDS = 8
# How the prompts are grouped in one reading after the other.
GROUPS = ((4,), (1, 1, 1, 1), (2, 2), (3, 1))
# As `min_effect`: take any adapter, also one that changes nothing, as every LoRA before the first step of its training.
ANY_EFFECT = -1.0

Logprobs = dict[int, float]


class Scorer(Protocol):
    """What the probe asks of an engine; None is the base."""

    async def probe(self, adapter_id: str | None, prompts: Sequence[str]) -> list[Logprobs]: ...
    async def score(self, adapter_id: str | None, text: str) -> float: ...


class Leaser(Protocol):
    """Holds an adapter resident while it is measured."""

    @property
    def backend(self) -> Scorer: ...
    def lease(
        self,
        adapter_id: str | None = None,
        path: Path | None = None,
        *,
        payer: Payer,
        priority: int = 0,
        for_client: bool = True,
    ) -> Any: ...


@asynccontextmanager
async def measuring(
    engine: Leaser, adapter_id: str | None = None, path: Path | None = None, *, priority: int = 0
) -> AsyncIterator[Scorer]:
    """Whoever computes, for questions of the server's own: about this adapter, or about the base."""
    async with engine.lease(adapter_id, path, payer=PROBES, priority=priority, for_client=False) as lease:
        with lease.watched(Watch(background=True)):
            yield engine.backend


@dataclass(frozen=True, slots=True)
class Base:
    """The base model's own values: measured once an engine start; `noise` again beside traffic."""

    logprobs: list[Logprobs]
    noise: float
    mean: float | None


class Probe:
    """Judges adapters by what they do. `min_effect` in nats; `max_perplexity` as a ratio, 0 for any."""

    def __init__(self, engine: Leaser, *, min_effect: float = 0.0, max_perplexity: float = 0.0) -> None:
        self._engine = engine
        self._min_effect = min_effect
        self._max_perplexity = max_perplexity
        self._base: Base | None = None

    async def start(self) -> None:
        """Measure the base: all prompts at once, and again one by one, which is another batch for each."""
        async with measuring(self._engine) as backend:
            together = await backend.probe(None, PROMPTS)
            alone = [logprobs for prompt in PROMPTS for logprobs in await backend.probe(None, [prompt])]
            mean = await backend.score(None, TEXT) if self._max_perplexity and together else None
        # A model that generates nothing has nothing to probe.
        self._base = Base(together, effect(together, alone), mean) if together else None

    @property
    def noise(self) -> float:
        """What the base's answers differ by from themselves, in nats."""
        return self._base.noise if self._base else 0.0

    def needed(self, min_effect: float | None = None) -> float:
        """The effect that an adapter must pass; `min_effect` in the place of the configured one."""
        if min_effect == ANY_EFFECT:
            return ANY_EFFECT
        return max(self._min_effect if min_effect is None else min_effect, ABOVE_NOISE * self.noise)

    async def judge(
        self, adapter_id: str, path: Path, min_effect: float | None = None, *, classifies: bool = False
    ) -> dict[str, Any]:
        """What was measured, for the registry; AdapterRejected for an adapter with no effect or a ruinous one.

        One that `classifies` says nothing: its head must tell texts apart.
        """
        if self._base is None:
            return {}
        text = bool(self._max_perplexity) and not classifies
        async with measuring(self._engine, adapter_id, path) as backend:
            probing = backend.probe(adapter_id, PROMPTS)
            scoring = backend.score(adapter_id, TEXT) if text else _nothing()
            answers, mean = await asyncio.gather(probing, scoring)
        finite = all(math.isfinite(value) for logprobs in answers for value in logprobs.values()) and all(answers)
        if not finite or (not classifies and all(map(_is_flat, answers))):
            what = "tokens are all as likely" if finite else "probabilities are not finite numbers"
            raise AdapterRejected(
                f"with this adapter the model's {what}: its weights overflow (is lora_alpha right?); train it again "
                "with a smaller scale",
                code="not_finite",
            )
        if classifies:
            return _tells_apart(answers, needed=self.needed(min_effect))
        moved = effect(self._base.logprobs, answers)
        needed, noise = self.needed(min_effect), self.noise
        if needed > ANY_EFFECT and moved <= max(DOUBTFUL, NOISY * self.noise) and (moved > needed or self.noise):
            moved, noise = await self._side_by_side(adapter_id, path, self._base)
            needed = max(self._min_effect if min_effect is None else min_effect, ABOVE_NOISE * noise)
        checks: dict[str, Any] = {"effect": round(moved, 4), "effect_needed": round(max(needed, 0.0), 4)}
        if moved <= needed:
            raise AdapterRejected(
                f"this adapter does not change what the base says: it moves the log-probabilities by {moved:.4f} on "
                f"average, and {needed:.4f} is needed to tell it from noise; was it trained, and for this base?"
                + self._way_out(moved, noise),
                code="no_effect",
            )
        if self._base.mean is not None and mean is not None:
            checks["perplexity_ratio"] = round(self._ratio(self._base.mean - mean), 4)
        return checks

    async def moved(self, adapter_id: str, path: Path) -> float | None:
        """By how much an adapter moves the log-probabilities, in nats; nothing is asked of it."""
        if self._base is None:
            return None
        async with measuring(self._engine, adapter_id, path) as backend:
            answers = await backend.probe(adapter_id, PROMPTS)
        return effect(self._base.logprobs, answers)

    async def _side_by_side(self, adapter_id: str, path: Path, base: Base) -> tuple[float, float]:
        """(effect, noise) of the means of several readings, the adapter's and the base's beside the same requests."""
        ours: list[list[Logprobs]] = []
        theirs: list[list[Logprobs]] = []
        for number in range(ROUNDS):
            sizes = GROUPS[number % len(GROUPS)]
            one, other = await asyncio.gather(self._read(sizes, adapter_id, path), self._read(sizes))
            ours.append(one)
            theirs.append(other)
            if number == 1 and theirs[0] == theirs[1] == base.logprobs and ours[0] == ours[1]:
                break  # it computes the same in any batch
        single = max(effect(theirs[0], other) for other in theirs[1:])
        self._base = replace(base, noise=max(base.noise, single))
        # The halves' means differ by more than the means of all: those are of twice as many readings.
        halves = [effect(averaged(readings[::2]), averaged(readings[1::2])) for readings in (ours, theirs)]
        return effect(averaged(theirs), averaged(ours)), max(halves) / math.sqrt(2)

    async def _read(
        self, sizes: Sequence[int], adapter_id: str | None = None, path: Path | None = None
    ) -> list[Logprobs]:
        """The answers to all prompts, asked in groups of these sizes."""
        begins = [sum(sizes[:number]) for number in range(len(sizes))]
        groups = [PROMPTS[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
        async with measuring(self._engine, adapter_id, path) as backend:
            answers = [await backend.probe(adapter_id, group) for group in groups]
        return [logprobs for group in answers for logprobs in group]

    def _way_out(self, moved: float, noise: float) -> str:
        """Where the limit is set, and not what the base differs by from itself, one push may set another."""
        if moved <= ABOVE_NOISE * noise:
            return ""
        return (
            f" If it is meant to change so little, push it with probe_min_effect below {moved:.4f} "
            "(`loradock adapters push --probe-min-effect`)"
        )

    def _ratio(self, nats: float) -> float:
        ratio = math.exp(min(nats, 700.0))
        if not ratio <= self._max_perplexity:
            raise AdapterRejected(
                f"with this adapter the perplexity of a plain text is {ratio:.3g} times the base's, and this server "
                f"takes up to {self._max_perplexity:g} times; train it more gently, or raise probe_max_perplexity",
                code="perplexity",
            )
        return ratio


def effect(base: Sequence[Logprobs], other: Sequence[Logprobs]) -> float:
    """Mean absolute difference in nats over the base's likeliest tokens of every prompt.

    A token that the other one does not list is at most as likely there as the last that it lists: a lower bound.
    """
    moved: list[float] = []
    for before, after in zip(base, other, strict=True):
        floor = min(after.values())
        for token, value in before.items():
            moved.append(abs(value - after[token]) if token in after else max(0.0, value - floor))
    return sum(moved) / len(moved) if moved else 0.0


def _is_flat(logprobs: Logprobs) -> bool:
    """Where numbers are too large, norms make zeros of them."""
    return len(logprobs) > 1 and len(set(logprobs.values())) == 1


def averaged(readings: Sequence[Sequence[Logprobs]]) -> list[Logprobs]:
    """Of several readings of the same prompts: the mean of each token that all of them list."""
    means = []
    for same in zip(*readings, strict=True):
        listed = set.intersection(*(set(logprobs) for logprobs in same))
        if not listed:  # nothing in common: the first reading is as good as any
            means.append(same[0])
            continue
        means.append({token: sum(each[token] for each in same) / len(same) for token in same[0] if token in listed})
    return means


def _tells_apart(answers: Sequence[Logprobs], needed: float) -> dict[str, Any]:
    """The largest difference of a label between the prompts; AdapterRejected, if there is none."""
    labels = [[answer[label] for answer in answers] for label in answers[0] if all(label in each for each in answers)]
    moved = max(max(values) - min(values) for values in labels)
    if moved <= needed:
        raise AdapterRejected(
            f"the head of this adapter says the same of every text: its labels move by {moved:.4f} between them; was "
            "it trained, and for this base?",
            code="no_effect",
        )
    return {"effect": round(moved, 4), "effect_needed": round(max(needed, 0.0), 4)}


async def _nothing() -> None:
    return None
