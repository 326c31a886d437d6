"""One signal of a version: it gathers its reference, then watches for drift.

    signal = Signal("prompt", needed=1000, threshold=1e5)
    signal.update(row)          # the first `needed` rows become the reference; then True when it raised the alarm

A signal alarms on evidence and effect together: evidence says that something moved (`detector.detector`: `threshold`
requests in the mean for some by chance; an alarm takes `SURE` times as much), effect that it moved far (`Tolerance`).
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift import answer_facts, prompt_facts
from serve.drift.answer_facts import Facts
from serve.drift.detector.detector import SURE, Drift
from serve.drift.detector.fixed_reference import FixedReference, Moved
from serve.drift.detector.mean_rows import MeanRows, with_surprise
from serve.drift.detector.recent_rows import Rows, all_finite, latest
from serve.drift.detector.reference_structure import ReferenceStructure, fit, local_range
from serve.drift.earlier_baselines import LAYOUT, current
from serve.drift.features.embedding import DIMENSIONS
from serve.drift.features.features import FOLLOW_UP, LOGPROB, OUTPUT, PROMPT, SIGNALS, Scale, columns, names
from serve.drift.features.token_surprise import NAMES, SKETCH, TokenSurprise
from serve.drift.state_arrays import below, prefixed

# Requests that make a reference; logprobs come of a sample of the traffic only, and follow-ups in blocks.
NEEDED = {PROMPT: 1000, OUTPUT: 1000, LOGPROB: 300, FOLLOW_UP: 400}
# Requests at the beginning of a change that may be older than it.
UNCERTAIN = 50
# What a score of tokens weighs in the evidence; every other score weighs 1.
SURPRISE_WEIGHT = 8.0
# Requests whose mean log-probability is the present one.
PRESENT = 64


class Phase(Enum):
    GATHERING = "gathering"
    WATCHING = "watching"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Effects that are too small to matter. A share q of foreign requests shifts a rank by q / 2 at most."""

    rank_shift: float = 0.1
    foreign_share: float = 0.03  # of the requests, at least; of prompts and outputs
    logprob: float = 0.15  # nat, of the mean logprob that prompt and length do not explain
    refusal: float = 0.02  # of all answers
    probe: float = 1.5  # times the probe's noise

    def beyond(self, effects: Mapping[str, float]) -> dict[str, float]:
        """Those of the effects that are above; signed, where a sign means something."""
        sizes = {name: value if name == "refusal" else abs(value) for name, value in effects.items()}
        return {name: effects[name] for name, size in sizes.items() if size > getattr(self, name)}


class Signal:
    """One signal of one version: gathers its reference, then watches. `update` takes rows of `features.features`."""

    def __init__(
        self,
        kind: str,
        *,
        needed: int | None = None,
        threshold: float = 1e5,
        tolerance: Tolerance = Tolerance(),
        seed: int = 0,
        dimensions: int = DIMENSIONS,
        ordered: bool = True,
    ) -> None:
        """ordered: the reference comes in the order of time."""
        if kind not in SIGNALS:
            raise ValueError(f"{kind} is no signal; {', '.join(SIGNALS)} are")
        self.kind = kind
        self.needed = max(2, NEEDED[kind] if needed is None else needed)
        self.threshold = threshold
        self.tolerance = tolerance
        self.names = names(kind)
        self._dimensions = dimensions
        self._columns = columns(kind, dimensions)
        self.surprise: TokenSurprise | None = None
        # The same of all of the reference's prompts, and not of the half that fits: what requests are routed by.
        self.whole: TokenSurprise | None = None
        self.samples = 0  # rows watched, the reference not among them
        self.alarms = 0
        self.alarmed_at: int | None = None  # in samples
        self._began_at = 0  # in samples: where the change began, as it was seen at the alarm
        self._seed = seed
        self._ordered = ordered
        self._gathered: list[NDArray] = []
        # By the number of the gathered row, until the reference is complete.
        self._sketches: dict[int, NDArray[np.int32]] = {}
        self._mean_rows: dict[int, NDArray[np.float32]] = {}
        self._detector: Drift | None = None
        self._scale: Scale | None = None
        self._structure = ReferenceStructure(len(self.names))
        self._rows = deque[Rows]()
        # Between these the mean log-probability moved over a reference with a structure in time.
        self._usual = np.zeros(2)
        # What is plain about prompts or answers: shares and means against those of the first ones.
        self.fixed = self._fixed()

    def configure(self, threshold: float, tolerance: Tolerance, needed: int | None = None) -> None:
        """Settings, which are in no `state()`. The evidence so far stays: it does not depend on the threshold. `needed`
        counts while the reference is gathered."""
        self.threshold = threshold
        self.tolerance = tolerance
        if self._detector is not None:
            self._detector.threshold = threshold
        elif needed is not None:
            self.needed = max(2, needed)
        self.fixed.gather(self.needed)

    @property
    def phase(self) -> Phase:
        return Phase.GATHERING if self._detector is None else Phase.WATCHING

    @property
    def watching(self) -> bool:
        return self._detector is not None

    @property
    def gathered(self) -> int:
        """Requests in the reference so far."""
        return self.needed if self._detector is not None else len(self._gathered)

    def update(self, row: ArrayLike) -> bool:
        """Take one raw row; True when it raised the alarm."""
        (alarms,) = self.steps([row])
        return alarms

    def steps(self, rows: Sequence[ArrayLike]) -> Iterator[bool]:
        """`update` with each of several rows, to be run to its end: faster than one by one, with the same numbers."""
        left = np.array(rows, np.float32)
        while len(left) and not self.watching:
            raws, part = self._parts(left[:1])
            mean = self._means(left[:1], raws)
            self._gather(raws[0], None if part is None else part[0], None if mean is None else mean[0])
            left = left[1:]
            yield False
        if len(left):
            yield from self._watch(left)

    def _watch(self, rows: NDArray[np.float32]) -> Iterator[bool]:
        detector = self._detector
        scale = self._scale
        structure = self._structure
        assert detector is not None and scale is not None
        raws = self._parts(rows)[0]
        means = self._means(rows, raws) if structure.exchangeable else None
        if means is not None and detector.means is None:
            detector.watch_means(MeanRows(self.needed, self._seed))
        scores = scale.each(raws)
        units = list(scores) if structure.exchangeable else [structure.unit(each) for each in scores]
        full = [unit for unit in units if unit is not None]
        steps = detector.steps(full, [None] * len(full) if means is None else means) if full else iter(())
        for raw, unit in zip(raws, units, strict=True):
            if unit is not None:
                next(steps)
            self.samples += 1
            self._rows.append(raw.copy())  # of the others nothing is kept
            alarms = self.alarmed_at is None and detector.drifted and detector.sure and self._matters(detector)
            if alarms:
                self._began_at = self.changed_at or 0
                self.alarmed_at = self.samples
                self.alarms += 1
            yield alarms
        next(steps, None)

    @property
    def drifted(self) -> bool:
        """Evidence has reached the threshold since `acknowledge`, whether or not the effect matters."""
        return self._detector is not None and self._detector.drifted

    @property
    def alarmed(self) -> bool:
        """Evidence and effect have, since `acknowledge`."""
        return self.alarmed_at is not None

    def fact_runs(self, units: Sequence[Facts], nows: Sequence[float]) -> Iterator[bool]:
        """Take what is plain about some prompts or answers, or blocks of them, to be run to its end; True after the one
        that raised the alarm."""
        for _ in self.fixed.steps(units, nows):
            alarms = self.alarmed_at is None and bool(self.moved())
            if alarms:
                self.alarmed_at = self._began_at = self.samples
                self.alarms += 1
            yield alarms

    def moved(self) -> list[Moved]:
        """What of the plain facts has left its reference for sure; the strongest first."""
        return self.fixed.moved(self.log_threshold + math.log(SURE))

    @property
    def log_evidence(self) -> float:
        return max(-math.inf if self._detector is None else self._detector.log_evidence, self.fixed.log_evidence)

    @property
    def log_threshold(self) -> float:
        return math.log(self.threshold)

    @property
    def changed_at(self) -> int | None:
        """After which sample the change began, by the strongest bet (at the alarm); None before any drift."""
        if self._detector is None or not self.drifted:
            return None
        if self.alarmed_at is not None:
            return self._began_at
        # A detector that was inherited or begun anew has seen more or fewer rows than this signal.
        since = (self._detector.updates - self._detector.changed_at) * self._structure.block + self._structure.waiting
        return max(self.samples - since, 0)

    def changed_rows(self) -> NDArray[np.float32]:
        """(n, columns): the raw rows since the change began, or all recent ones before any drift; `needed` at most."""
        changed_at = self.changed_at
        return latest(self._rows, self._columns, None if changed_at is None else self.samples - changed_at)

    def raw(self, row: NDArray[np.floating]) -> NDArray[np.float32]:
        """A request's row as `changed_rows` has it: with the scores of its tokens in place of their sketch."""
        return self._parts(np.asarray(row, np.float32)[None])[0][0]

    @property
    def reference_row(self) -> NDArray | None:
        """(columns,): the mean raw row of the reference; None while gathering."""
        return None if self._scale is None else self._scale.centre

    def structure(self) -> dict[str, Any]:
        """How far requests were exchangeable in the reference, and what follows; empty while gathering."""
        if self._detector is None:
            return {}
        report, means = self._structure.report(self.names), self._detector.means
        return report if means is None else report | {"mean_rows": means.phase.value}

    def effects(self) -> dict[str, float]:
        """How far things moved, in the units of `Tolerance`, with a sign if that means something; empty at first."""
        if self._detector is None or self._scale is None:
            return {}
        effects = {"rank_shift": float(np.abs(self._detector.rank_shift).max())}
        share = self._detector.foreign_share
        if self.kind != LOGPROB and share is not None:
            effects["foreign_share"] = share
        effects |= {each.name: each.now - each.before for each in self.moved() if each.name == "refusal"}
        return effects | self._logprob()

    def beyond(self) -> dict[str, float]:
        """The effects above tolerance: a rise of refusals, a change of logprob in any direction, a shift of ranks."""
        fixed = {each.name: each.now - each.before for each in self.moved()}
        return fixed | self.tolerance.beyond(self.effects())

    def _logprob(self) -> dict[str, float]:
        """How far log-probabilities moved, less a standard error; empty where none are measured."""
        rows = latest(self._rows, self._columns, PRESENT)
        if self._scale is None or self.kind != LOGPROB or not len(rows):
            return {}
        onto = self._scale.matrix[:, 0]
        value = float(((rows - self._scale.centre) @ onto).mean() / onto[0])
        error = math.sqrt(self._structure.autocorrelation / len(rows)) / float(onto[0])
        moved = value - float(np.clip(value, *self._usual))
        return {"logprob": math.copysign(max(abs(moved) - error, 0.0), moved)}

    def _matters(self, detector: Drift) -> bool:
        """Whether an effect is above its tolerance for sure: a rank shift of a few requests is not."""
        share = detector.foreign_share
        if self.kind != LOGPROB and share is not None and share > self.tolerance.foreign_share:
            return True
        if np.abs(detector.sure_rank_shift).max() > self.tolerance.rank_shift:
            return True
        return bool(self.tolerance.beyond(self._logprob()))

    def movers(self, most: int = 5) -> list[tuple[str, float, float]]:
        """(score, ln evidence, rank shift) of the scores with the most evidence of their own, the strongest first."""
        if self._detector is None:
            return []
        evidence, shifts = self._detector.evidence_by_score, self._detector.rank_shift
        order = np.argsort(-evidence, kind="stable")[:most]
        return [(self.names[i], float(evidence[i]), float(shifts[i])) for i in order]

    def acknowledge(self) -> None:
        """An alarm has been dealt with: the evidence begins again at nothing, the reference stays."""
        self.alarmed_at = None
        self.fixed.reset()
        if self._detector is not None:
            self._detector.reset()

    def accept(self) -> None:
        """The change is here to stay: the requests since it began are the reference now. What is missing of `needed`
        rows is gathered; counts go on."""
        rows = self.changed_rows()
        if self.drifted:
            # When it began is an estimate: of the first rows some may be older.
            rows = rows[min(len(rows) // 4, UNCERTAIN) :]
        self.alarmed_at = None
        self._detector = None
        self._scale = None
        self._ordered = True
        self.fixed = self._fixed()
        self._rows.clear()
        # What was gathered so far stays, where there is no reference yet.
        self._gathered += list(rows)
        if len(self._gathered) >= self.needed:
            self._freeze()

    def begin_anew(self) -> None:
        """For the next version: the reference and what the bets learned stay; evidence, effects, counts and alarms are
        its own."""
        self.samples = 0
        self.alarms = 0
        self.alarmed_at = None
        self._rows.clear()
        self.fixed.reset()
        if self._detector is not None:
            self._detector.reset(effects=True)

    def take_mean_rows(self, other: Signal) -> None:
        """Those of the `other` signal, which are in no `state()`."""
        if self._detector is not None and other._detector is not None:
            self._detector.watch_means(copy.deepcopy(other._detector.means))

    def state(self) -> dict[str, NDArray]:
        if self._detector is None or self._scale is None:
            rows = np.array(self._gathered, np.float32) if self._gathered else np.zeros((0, 0), np.float32)
            arrays = {"gathered": rows}  # never with sketches of their tokens
        else:
            arrays = {"rows": latest(self._rows, self._columns), "usual": self._usual.copy()}
            arrays |= prefixed(self._structure.state(), "structure.")
            arrays |= prefixed(self._scale.arrays(), "scale.")
            arrays |= prefixed(self._detector.state(), "detector.")
        if self.surprise is not None:
            arrays |= prefixed(self.surprise.arrays(), "surprise.")
        if self.whole is not None:
            arrays |= prefixed(self.whole.arrays(), "whole.")
        if self.fixed.kinds:
            arrays |= prefixed(self.fixed.state(), "fixed.")
        alarmed_at = -1 if self.alarmed_at is None else self.alarmed_at
        return arrays | {
            "counts": np.array([self.needed, self.samples, self.alarms, alarmed_at, self._seed, self._began_at]),
            LAYOUT: np.array(1),
        }

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Become the signal whose `state()` this was, in whatever release; this one's tolerance stays."""
        state = current(self.kind, state, self._dimensions)
        # Earlier releases kept neither the sixth count nor the rows.
        needed, samples, alarms, alarmed_at, seed, *began_at = (int(count) for count in state["counts"])
        self.needed = needed
        self.samples = samples
        self.alarms = alarms
        self._seed = seed
        self._began_at = began_at[0] if began_at else 0
        self.alarmed_at = None if alarmed_at < 0 else alarmed_at
        fixed = below(state, "fixed.")
        # Earlier releases had one for each place in a conversation.
        self.fixed.restore(below(fixed, "first.") or below(fixed, "later.") or fixed)
        if "surprise.spread" in state:
            self._score_tokens(TokenSurprise.from_arrays(below(state, "surprise.")))
        if "whole.spread" in state:
            self.whole = TokenSurprise.from_arrays(below(state, "whole."))
        if "gathered" in state:
            rows = np.asarray(state["gathered"], np.float32)
            if len(rows) and rows.shape[1] != self._columns:
                raise ValueError(f"{self.kind} has rows of {rows.shape[1]} numbers, not {self._columns}")
            self._gathered = list(rows)
            return
        scale = Scale.from_arrays(below(state, "scale."))
        detector = Drift.from_state(below(state, "detector."))
        shape = (self._columns, len(self.names))
        fits = scale.matrix.shape == shape and scale.centre.shape == shape[:1]
        if not fits or len(detector.rank_shift) != len(self.names):
            raise ValueError(f"{self.kind} has a scale of {scale.matrix.shape}, not {shape}")
        self._scale = scale
        self._detector = detector
        self._gathered = []
        self.threshold = detector.threshold
        self._rows = deque(np.array(state.get("rows", ()), np.float32), maxlen=self.needed)
        self._structure = ReferenceStructure.from_state(below(state, "structure."), len(self.names))
        self._usual = np.array(state.get("usual", np.zeros(2)))

    def _fixed(self) -> FixedReference:
        facts = answer_facts if self.kind == OUTPUT else prompt_facts
        return FixedReference({} if self.kind == LOGPROB else facts.KINDS, self.needed, facts.WEIGHTS)

    def _parts(self, rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Rows (n, columns) as the scale takes them, and the sketches of their tokens where those are still needed."""
        columns = self._own_columns
        carried = rows[:, columns : columns + SKETCH] if rows.shape[1] >= columns + SKETCH else None
        if carried is None and (rows.shape[1] != columns or self.surprise is not None):
            raise ValueError(f"a row of {self.kind} has {columns} numbers; this one has {rows.shape[1]}")
        raw = rows[:, :columns]
        if self.surprise is not None and carried is not None:
            raw, carried = np.concatenate((raw, self.surprise(carried)), axis=1), None
        if not all_finite(raw):
            raise ValueError(f"a row of {self.kind} holds a number that is not finite; leave the request out")
        return raw, carried

    @property
    def _own_columns(self) -> int:
        """Numbers of a row before those that are made of its tokens."""
        return self._columns - (0 if self.surprise is None else len(NAMES))

    def _means(self, rows: NDArray[np.float32], raws: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """(n, numbers) what comes behind the sketches of the tokens, and what those became in `raws` of `_parts`."""
        means, own = rows[:, self._own_columns + SKETCH :], self._own_columns
        return with_surprise(means, raws[:, own:] if self.surprise is not None else None) if means.size else None

    def _gather(self, raw: Rows, part: Rows | None, mean: Rows | None) -> None:
        if part is not None:
            self._sketches[len(self._gathered)] = part.astype(np.int32)
        if mean is not None:
            self._mean_rows[len(self._gathered)] = mean
        self._gathered.append(raw)
        # After a restart half of the reference has to come anew, with its tokens; it does not wait for that for ever.
        complete = not self._sketches or 2 * len(self._sketches) >= self.needed
        if len(self._gathered) >= self.needed * (1 if complete else 2):
            self._freeze()

    def _freeze(self) -> None:
        rows = self._gathered
        if 2 * len(self._sketches) >= self.needed:
            rows = self._scored(sorted(self._sketches))
        surprises = len(NAMES) if self.surprise is not None else 0
        # Hundreds of numbers tell of a slow change that a few scores do not.
        means = self._of_mean_rows()
        slow = means is not None and means.wanders
        self._scale, self._structure, reference = fit(
            self.kind, rows, surprises=surprises, seed=self._seed, ordered=self._ordered, slow=slow
        )
        weights = np.repeat((1.0, SURPRISE_WEIGHT), (len(self.names) - surprises, surprises))
        self._detector = Drift(
            reference,
            threshold=self.threshold,
            weights=weights,
            margin=self._structure.margin,
            means=means if self._structure.exchangeable else None,
            seed=self._seed,
        )
        self._usual = np.zeros(2)
        if self.kind == LOGPROB and not self._structure.exchangeable:
            onto = self._scale.matrix[:, 0]
            self._usual = local_range((np.array(rows) - self._scale.centre) @ onto / onto[0], PRESENT)
        self._rows = deque(maxlen=self.needed)
        self._gathered = []
        self._sketches = {}
        self._mean_rows = {}

    def _of_mean_rows(self) -> MeanRows | None:
        """Of those of the reference; where a restart took some, new ones are gathered first."""
        if not self._mean_rows:
            return None
        if len(self._mean_rows) < len(self._gathered):
            return MeanRows(self.needed, self._seed)
        return MeanRows.of(list(self._mean_rows.values()), self._seed, self._ordered)

    def _scored(self, numbers: Sequence[int]) -> list[Rows]:
        """The gathered rows of these numbers, those since a restart, with the scores of their tokens, which every other
        one of them fits."""
        fitting = [self._sketches[number] for number in numbers[::2]]
        surprise, scores = TokenSurprise.fit(fitting)
        self._score_tokens(surprise)
        if self.kind == PROMPT:
            self.whole, _ = TokenSurprise.fit([self._sketches[number] for number in numbers])
        scored = surprise(np.array([self._sketches[number] for number in numbers], np.float32))
        scored[::2] = scores  # as if they had not been among those that they fitted
        for number, row in zip(numbers, scored, strict=True):
            if number in self._mean_rows:
                self._mean_rows[number] = with_surprise(self._mean_rows[number], row)
        return [np.concatenate((self._gathered[number], row)) for number, row in zip(numbers, scored, strict=True)]

    def _score_tokens(self, surprise: TokenSurprise) -> None:
        """From now on rows carry a sketch of their tokens, which becomes their last columns."""
        if self.surprise is None:
            self.names += NAMES
            self._columns += len(NAMES)
        self.surprise = surprise
