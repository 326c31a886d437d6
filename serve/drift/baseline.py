"""What a version is compared with, and how far it has moved from that: kept across restarts.

    baseline = Baseline(Provenance("acme/tone", "1a7b88586afe", embedding=..., tokenizer=...))
    baseline.signals["prompt"].update(row)          # the first `needed` rows become the reference, then it watches
    baseline.save(folder); Baseline.load(folder, expected)
    baseline.successor(provenance)                  # the next version: prompts go on, answers begin anew

A signal alarms on evidence and effect together: evidence says that something moved (`serve.drift.detector`: at least
`threshold` requests in the mean until a false alarm), effect says that it moved far enough to matter (`Tolerance`).

On the disk: baseline-<sha256>.npz with plain arrays, and baseline.json which names it. The arrays are written and
fsynced first and the JSON is renamed into place last, so that a kill leaves the old pair or the new one. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.detector import EFFECT_HALF_LIFE, Drift, all_finite
from serve.drift.embedding import DIMENSIONS
from serve.drift.features import FEATURES, LOGPROB, OUTPUT, PROMPT, SIGNALS, Scale, names
from serve.errors import ConfigError
from serve.files import write_whole

FORMAT = 2
# Requests that make a reference; logprobs come of a sample of the traffic only.
NEEDED = {PROMPT: 1000, OUTPUT: 1000, LOGPROB: 300}
MAX_BYTES = 256 << 20
_JSON = "baseline.json"
_ARRAYS = re.compile(r"baseline-[0-9a-f]{64}\.npz")
_REFUSAL = names(OUTPUT, 0).index("refusal")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Effects that are too small to matter. A share q of foreign requests shifts a rank by q / 2 at most."""

    rank_shift: float = 0.1
    logprob: float = 0.15  # nat, of the mean logprob that prompt and length do not explain
    refusal: float = 0.02  # of all answers
    probe: float = 1.5  # times the probe's noise


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a baseline belongs to; it fits nothing else."""

    adapter: str
    version: str
    embedding: str
    tokenizer: str
    seed: int = 0
    dimensions: int = DIMENSIONS
    features: int = FEATURES
    origin: str = "traffic"  # or shipped

    def check(self, expected: Provenance) -> None:
        """ConfigError, if rows of the two cannot be compared."""
        reasons = {
            "adapter": "it belongs to another adapter",
            "version": "it belongs to another version",
            "embedding": "it was made with another embedding table, so its vectors mean something else",
            "tokenizer": "it was made with another tokenizer",
            "dimensions": "its vectors have another number of dimensions",
            "features": "its features were computed by another release",
        }
        for name, reason in reasons.items():
            actual, wanted = getattr(self, name), getattr(expected, name)
            if actual != wanted:
                raise ConfigError(
                    f"the baseline does not fit: {reason} ({name} {actual}, expected {wanted}); "
                    "build it again with `loradock baseline build`, or remove it and let traffic make one"
                )


class Phase(Enum):
    GATHERING = "gathering"
    WATCHING = "watching"


class Signal:
    """One signal of one version: gathers its reference, then watches. `update` takes rows of `serve.drift.features`."""

    def __init__(
        self,
        kind: str,
        *,
        needed: int | None = None,
        threshold: float = 1e5,
        tolerance: Tolerance = Tolerance(),
        seed: int = 0,
        dimensions: int = DIMENSIONS,
    ) -> None:
        if kind not in SIGNALS:
            raise ValueError(f"{kind} is no signal; {', '.join(SIGNALS)} are")
        self.kind = kind
        self.needed = max(2, NEEDED[kind] if needed is None else needed)
        self.threshold = threshold
        self.tolerance = tolerance
        self.names = names(kind, dimensions)
        # Beside its three scores, a logprob row carries length and the prompt's row, which are regressed on.
        self._columns = len(self.names) + (dimensions + 2 if kind == LOGPROB else 0)
        self.samples = 0  # rows watched, the reference not among them
        self.alarms = 0
        self.alarmed_at: int | None = None  # in samples
        self._seed = seed
        self._gathered: list[NDArray] = []
        self._detector: Drift | None = None
        self._scale: Scale | None = None
        self._recent = np.zeros(0)
        self._weight = 0.0

    def set_threshold(self, threshold: float) -> None:
        """The evidence so far stays: it does not depend on the threshold."""
        self.threshold = threshold
        if self._detector is not None:
            self._detector.threshold = threshold

    @property
    def phase(self) -> Phase:
        return Phase.GATHERING if self._detector is None else Phase.WATCHING

    @property
    def gathered(self) -> int:
        """Requests in the reference so far."""
        return self.needed if self._detector is not None else len(self._gathered)

    def update(self, row: ArrayLike) -> bool:
        """Take one raw row; True when it raised the alarm."""
        raw = np.asarray(row, np.float32)
        if raw.shape != (self._columns,):
            raise ValueError(f"a row of {self.kind} has {self._columns} numbers; this one has the shape {raw.shape}")
        if not all_finite(raw):
            raise ValueError(f"a row of {self.kind} holds a number that is not finite; leave the request out")
        if self._detector is None or self._scale is None:
            self._gather(raw)
            return False
        self.samples += 1
        fade = 0.5 ** (1 / EFFECT_HALF_LIFE)
        self._recent = self._recent * fade + (raw - self._scale.centre)
        self._weight = self._weight * fade + 1
        self._detector.update(self._scale(raw))
        if self.alarmed_at is None and self._detector.drifted and self.beyond():
            self.alarmed_at = self.samples
            self.alarms += 1
            return True
        return False

    @property
    def drifted(self) -> bool:
        """Evidence has reached the threshold since `acknowledge`, whether or not the effect matters."""
        return self._detector is not None and self._detector.drifted

    @property
    def alarmed(self) -> bool:
        """Evidence and effect have, since `acknowledge`."""
        return self.alarmed_at is not None

    @property
    def log_evidence(self) -> float:
        return -math.inf if self._detector is None else self._detector.log_evidence

    @property
    def log_threshold(self) -> float:
        return math.log(self.threshold)

    @property
    def changed_at(self) -> int | None:
        """After which sample the change began, by the strongest bet; None before any drift."""
        return self._detector.changed_at if self._detector is not None and self.drifted else None

    def effects(self) -> dict[str, float]:
        """How far things moved, in the units of `Tolerance`; empty while gathering. Signed, where a sign means
        something."""
        if self._detector is None or self._scale is None:
            return {}
        shifts = self._detector.rank_shift
        effects = {"rank_shift": float(np.abs(shifts).max())}
        if not self._weight:
            return effects
        recent = self._recent / self._weight
        if self.kind == OUTPUT:
            error = self._detector.gauge_error / float(self._scale.matrix[_REFUSAL, _REFUSAL])
            effects["refusal"] = _beyond_error(float(recent[_REFUSAL]), error)
        if self.kind == LOGPROB:
            onto = self._scale.matrix[:, 0]
            error = self._detector.gauge_error / float(onto[0])
            effects["logprob"] = _beyond_error(float(recent @ onto / onto[0]), error)
        return effects

    def beyond(self) -> dict[str, float]:
        """The effects above tolerance: a rise of refusals, a change of logprob in either direction, a shift of
        ranks."""
        effects = self.effects()
        sizes = {name: value if name == "refusal" else abs(value) for name, value in effects.items()}
        return {name: effects[name] for name, size in sizes.items() if size > getattr(self.tolerance, name)}

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
        if self._detector is not None:
            self._detector.reset()

    def state(self) -> dict[str, NDArray]:
        if self._detector is None or self._scale is None:
            rows = np.array(self._gathered, np.float32) if self._gathered else np.zeros((0, 0), np.float32)
            arrays = {"gathered": rows}
        else:
            arrays = {"recent": self._recent.copy(), "weight": np.array(self._weight)}
            arrays |= {f"scale.{name}": value for name, value in self._scale.arrays().items()}
            arrays |= {f"detector.{name}": value for name, value in self._detector.state().items()}
        alarmed_at = -1 if self.alarmed_at is None else self.alarmed_at
        return arrays | {"counts": np.array([self.needed, self.samples, self.alarms, alarmed_at, self._seed])}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Become the signal whose `state()` this was; this one's tolerance stays."""
        needed, samples, alarms, alarmed_at, seed = (int(count) for count in state["counts"])
        self.needed, self.samples, self.alarms, self._seed = needed, samples, alarms, seed
        self.alarmed_at = None if alarmed_at < 0 else alarmed_at
        if "gathered" in state:
            rows = np.asarray(state["gathered"], np.float32)
            if len(rows) and rows.shape[1] != self._columns:
                raise ValueError(f"{self.kind} has rows of {rows.shape[1]} numbers, not {self._columns}")
            self._gathered = list(rows)
            return
        scale = Scale.from_arrays(_below(state, "scale."))
        detector = Drift.from_state(_below(state, "detector."))
        shape = (self._columns, len(self.names))
        if scale.matrix.shape != shape or len(detector.rank_shift) != len(self.names):
            raise ValueError(f"{self.kind} has a scale of {scale.matrix.shape}, not {shape}")
        self._scale, self._detector, self._gathered = scale, detector, []
        self.threshold = detector.threshold
        self._recent, self._weight = np.array(state["recent"]), float(state["weight"])

    def _gather(self, raw: NDArray) -> None:
        self._gathered.append(raw)
        if len(self._gathered) >= self.needed:
            self._freeze()

    def _freeze(self) -> None:
        # One half fits the scale and the other is ranked: see serve.drift.features. Alternating, so that both span
        # all the time.
        scale = Scale.fit(self.kind, self._gathered[::2])
        # One by one, as live rows will be: a product of many rows may round otherwise, and equal rows must stay ties.
        reference = np.array([scale(raw) for raw in self._gathered[1::2]])
        self._detector = Drift(reference, threshold=self.threshold, seed=self._seed)
        self._scale, self._gathered = scale, []
        self._recent = np.zeros(len(scale.centre))


@dataclass(slots=True, eq=False)
class Baseline:
    """All signals of one version, and what belongs to them. `probe` holds what the probe prompts answered, as
    arrays."""

    provenance: Provenance
    signals: dict[str, Signal] = field(default_factory=dict)
    probe: dict[str, NDArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in SIGNALS:
            self.signals.setdefault(kind, self._signal(kind))

    @classmethod
    def build(cls, provenance: Provenance, rows: Mapping[str, Iterable[ArrayLike]], **options: Any) -> Self:
        """From raw rows by signal, all of them reference: what a CLI ships. A signal without rows gathers from
        traffic."""
        self = cls(replace(provenance, origin="shipped"))
        for kind, signal_rows in rows.items():
            raw = list(signal_rows)
            if len(raw) < 20:
                raise ConfigError(
                    f"{len(raw)} requests are too few for a reference of {kind}; give at least 20, better 1,000"
                )
            self.signals[kind] = self._signal(kind, needed=len(raw), **options)
            for row in raw:
                self.signals[kind].update(row)
        return self

    def configure(self, *, threshold: float, tolerance: Tolerance, needed: Mapping[str, int] | None = None) -> None:
        """Settings, which are no part of what is kept; `needed` counts for the signals that still gather."""
        for kind, signal in self.signals.items():
            signal.tolerance = tolerance
            signal.set_threshold(threshold)
            if signal.phase is Phase.GATHERING and needed is not None:
                signal.needed = max(2, needed.get(kind, signal.needed))

    def successor(self, provenance: Provenance) -> Baseline:
        """For the adapter's next version: the prompts' signal goes on with all it knows, the answers' begin anew."""
        replace(self.provenance, version=provenance.version).check(provenance)
        prompts = self._signal(PROMPT, tolerance=self.signals[PROMPT].tolerance)
        prompts.restore(self.signals[PROMPT].state())
        return Baseline(provenance, {PROMPT: prompts})

    def save(self, folder: Path) -> Path:
        """Write both files, the JSON last; returns it. `folder` is made if need be."""
        arrays = {
            f"{kind}/{name}": value for kind, signal in self.signals.items() for name, value in signal.state().items()
        }
        arrays |= {f"probe/{name}": np.asarray(value) for name, value in self.probe.items()}
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        data = packed.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"baseline-{digest}.npz"
        if not file.exists():
            write_whole(file, data)
        header = {"format": FORMAT, "arrays": file.name, **asdict(self.provenance)}
        write_whole(folder / _JSON, (json.dumps(header, indent=1) + "\n").encode())
        for other in folder.glob("baseline-*.npz"):
            if other != file:
                other.unlink(missing_ok=True)
        return folder / _JSON

    @classmethod
    def load(cls, folder: Path, expected: Provenance, *, tolerance: Tolerance = Tolerance()) -> Self:
        """What `save` wrote there, or ConfigError: damaged, of another format, or not what is `expected`."""
        provenance, arrays = _read(folder)
        provenance.check(expected)
        self = cls(provenance)
        try:
            for kind, signal in self.signals.items():
                signal.tolerance = tolerance
                signal.restore(_below(arrays, f"{kind}/"))
        except (KeyError, ValueError, IndexError, TypeError) as damaged:
            raise ConfigError(
                f"the baseline's arrays are not what they should be ({damaged}); build it again"
            ) from damaged
        self.probe = _below(arrays, "probe/")
        return self

    def _signal(self, kind: str, **options: Any) -> Signal:
        # Each signal has random numbers of its own.
        seed = self.provenance.seed * len(SIGNALS) + SIGNALS.index(kind)
        return Signal(kind, seed=seed, dimensions=self.provenance.dimensions, **options)


def _read(folder: Path) -> tuple[Provenance, dict[str, NDArray]]:
    again = "build it again with `loradock baseline build`, or remove it and let traffic make one"
    try:
        header = json.loads((folder / _JSON).read_bytes())
        if header.pop("format") != FORMAT:
            raise ConfigError(f"the baseline is of a format that this release does not read; {again}")
        name = header.pop("arrays")
        provenance = Provenance(**header)
        if not _ARRAYS.fullmatch(name):
            raise ValueError("the name of its arrays is not the name of such a file")
        data = (folder / name).read_bytes()
        if len(data) > MAX_BYTES or name != f"baseline-{hashlib.sha256(data).hexdigest()}.npz":
            raise ValueError("its arrays are not the ones that were written")
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            if sum(member.file_size for member in packed.infolist()) > MAX_BYTES:
                raise ValueError(f"its arrays are larger than {MAX_BYTES >> 20} MiB")
        with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
            return provenance, {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as damaged:
        raise ConfigError(f"the baseline cannot be read ({damaged}); {again}") from damaged


def _below(arrays: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _beyond_error(value: float, error: float) -> float:
    """What is left of `value` when its standard error is taken off."""
    return math.copysign(max(abs(value) - error, 0.0), value)
