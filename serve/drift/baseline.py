"""What a version is compared with, and how far it has moved from that: kept across restarts.

    baseline = Baseline(Provenance("acme/tone", "1a7b88586afe", embedding=..., tokenizer=...))
    baseline.signals["prompt"].update(row)          # the first `needed` rows become the reference, then it watches
    baseline.save(folder); Baseline.load(folder, expected)
    baseline.successor(provenance)                  # the next version: the prompts' reference, and no evidence

On the disk: baseline-<sha256>.npz with plain arrays, and baseline.json which names it. The arrays are written and
fsynced first and the JSON is renamed into place last, so that a kill leaves the old pair or the new one. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.drift.features.embedding import DIMENSIONS
from serve.drift.features.features import (
    EARLIER_FEATURES,
    FEATURES,
    FOLLOW_UP,
    LOGPROB,
    OUTPUT,
    PROMPTS,
    SIGNALS,
    VECTORS,
)
from serve.drift.parameter_strata import ParameterStrata
from serve.drift.signal import NEEDED, Phase, Signal, Tolerance
from serve.drift.state_arrays import below, prefixed
from serve.drift.thinning import Thinning, inherited
from serve.errors import ConfigError
from serve.files import write_whole

__all__ = ["MAX_BYTES", "NEEDED", "Baseline", "Phase", "Provenance", "Signal", "Tolerance"]

FORMAT = 2
MAX_BYTES = 256 << 20
_JSON = "baseline.json"
_ARRAYS = re.compile(r"baseline-[0-9a-f]{64}\.npz")


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


@dataclass(slots=True, eq=False)
class Baseline:
    """All signals of one version, and what belongs to them, as arrays: `probe` holds what the probe prompts answered,
    `sampling` gives what the thinning of the version's traffic remembers."""

    provenance: Provenance
    signals: dict[str, Signal] = field(default_factory=dict)
    probe: dict[str, NDArray] = field(default_factory=dict)
    sampling: Callable[[], dict[str, NDArray]] = dict
    strata: dict[str, ParameterStrata] = field(init=False)

    def __post_init__(self) -> None:
        for kind in SIGNALS:
            self.signals.setdefault(kind, self._signal(kind))
        self.strata = {kind: self._strata(kind) for kind in (OUTPUT, LOGPROB)}

    def counts(self, kind: str) -> tuple[int, int]:
        """Samples and alarms of a kind, whatever the parameters."""
        if kind in self.strata:
            return self.strata[kind].counts()
        return self.signals[kind].samples, self.signals[kind].alarms

    def every(self, kind: str) -> list[Signal]:
        """The signals of a kind: of each set of parameters, the one of `signals` first."""
        others = self.strata[kind].others.values() if kind in self.strata else ()
        return [self.signals[kind], *others]

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
            # The order of a list of prompts says nothing about time.
            self.signals[kind] = self._signal(kind, needed=len(raw), ordered=False, **options)
            for row in raw:
                self.signals[kind].update(row)
        return self

    def configure(self, *, threshold: float, tolerance: Tolerance, needed: Mapping[str, int] | None = None) -> None:
        """Settings, which are no part of what is kept; `needed` counts for the signals that still gather."""
        for kind in SIGNALS:
            for signal in self.every(kind):
                signal.configure(threshold, tolerance, None if needed is None else needed.get(kind))
        for kind, strata in self.strata.items():
            strata.gather(self.signals[kind].needed)

    def successor(self, provenance: Provenance) -> Baseline:
        """For the adapter's next version: the prompts' signal keeps its reference, the answers' begin anew."""
        replace(self.provenance, version=provenance.version).check(provenance)
        remembered = inherited(self.sampling())
        return Baseline(provenance, {kind: self._inherited(kind) for kind in PROMPTS}, sampling=lambda: remembered)

    def _inherited(self, kind: str) -> Signal:
        """A signal of prompts for the next version."""
        signal = self._signal(kind, needed=self.signals[kind].needed, tolerance=self.signals[kind].tolerance)
        signal.restore(self.signals[kind].state())
        signal.take_mean_rows(self.signals[kind])
        signal.begin_anew()
        return signal

    def save(self, folder: Path) -> Path:
        """Write both files, the JSON last; returns it. `folder` is made if need be."""
        arrays = {
            f"{kind}/{name}": value for kind, signal in self.signals.items() for name, value in signal.state().items()
        }
        for kind, strata in self.strata.items():
            arrays |= prefixed(strata.state(), f"{kind}.strata/")
            for i, signal in enumerate(strata.others.values()):
                arrays |= prefixed(signal.state(), f"{kind}.{i}/")
        arrays |= {f"probe/{name}": np.asarray(value) for name, value in self.probe.items()}
        arrays |= prefixed(self.sampling(), "sampling/")
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
        older = provenance.features in EARLIER_FEATURES
        provenance.check(replace(expected, features=provenance.features) if older else expected)
        if provenance.features == VECTORS:  # what is left of it is what today's rows have
            provenance = replace(provenance, features=FEATURES)
        self = cls(provenance)
        try:
            for kind, signal in self.signals.items():
                signal.configure(signal.threshold, tolerance)
                # Earlier releases did not watch follow-ups.
                if kind != FOLLOW_UP or below(arrays, f"{kind}/"):
                    signal.restore(below(arrays, f"{kind}/"))
            for kind, strata in self.strata.items():
                for i, signal in enumerate(strata.restore(below(arrays, f"{kind}.strata/"))):
                    signal.restore(below(arrays, f"{kind}.{i}/"))
            if remembered := below(arrays, "sampling/"):
                Thinning().restore(remembered)
        except (KeyError, ValueError, IndexError, TypeError) as damaged:
            raise ConfigError(
                f"the baseline's arrays are not what they should be ({damaged}); build it again"
            ) from damaged
        self.probe = below(arrays, "probe/")
        self.sampling = lambda: remembered
        return self

    def _strata(self, kind: str) -> ParameterStrata:
        def made() -> Signal:
            shown = self.signals[kind]
            return self._signal(kind, needed=shown.needed, threshold=shown.threshold, tolerance=shown.tolerance)

        return ParameterStrata(kind, self.signals, made, self.signals[kind].needed)

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
