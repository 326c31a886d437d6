"""The watcher's inner loops in C++, compiled at first use; None where there is no compiler, and numpy does the same.

A detector takes a block of requests in one call of `detector.cpp`, over the arrays that Python owns: the numpy code
beside it says what is computed, and goes on where the other stopped. `tokens.cpp` makes rows of tokens. Long calls
release the interpreter, so that the event loop does not wait for them.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from ctypes import Structure, c_double, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.cpu_kernels.build import compiled

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp-simd", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# What numpy rounds twice is not to be rounded once, but in sums of products.
_SOURCES = {
    _FOLDER / "detector.cpp": (*_FLAGS, "-ffp-contract=off"),
    _FOLDER / "tokens.cpp": (*_FLAGS, "-ffp-contract=off"),
    _FOLDER / "products.cpp": (*_FLAGS, "-ffp-contract=fast"),
}
_HEADERS = [_FOLDER / "detector.h", _FOLDER / "products.h"]


_NOTHING = ctypes.c_char * 0


class MeanRowsView(Structure):
    """`drift::MeanRows`."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "size", "capacity", "known", "waiting", "turn", "ranked")),
        ("farthest", c_double),
        *((name, c_void_p) for name in ("centre", "whiten", "reference", "bag", "along", "pull", "leverage")),
        *((name, c_void_p) for name in ("known_leverage", "teaching", "times", "towards", "onto", "mean_part")),
        *((name, c_void_p) for name in ("waiting_rows", "waiting_places", "r", "page", "start", "bets")),
        ("ages", c_int64),
        *((name, c_void_p) for name in ("faded", "lots", "reference_along")),
        ("placed", c_int64),
    )


class EffectView(Structure):
    """`drift::Effect`."""

    _fields_ = (
        *((name, c_int64) for name in ("streams", "size")),
        *((name, c_void_p) for name in ("in_end", "usual", "usual_not", "larger", "larger_not", "weights")),
        *((name, c_void_p) for name in ("counts", "hits", "total", "seen")),
        *((name, c_double) for name in ("fade", "most", "enough")),
        *((name, c_int64) for name in ("first", "every", "betting", "beyond")),
    )


class DetectorView(Structure):
    """`drift::Detector`."""

    _fields_ = (
        *((name, c_int64) for name in ("scores", "silent", "updates")),
        *((name, c_void_p) for name in ("lots", "bags")),
        *((name, c_int64) for name in ("bags_size", "capacity")),
        *((name, c_void_p) for name in ("margin", "share", "r", "page", "start", "learned", "unit", "weight")),
        *((name, c_void_p) for name in ("fades", "bins", "score_bets", "direction_bets")),
        ("evidence", c_double),
        *((name, c_int64) for name in ("directions", "size", "bag_capacity", "age", "turn")),
        *((name, c_void_p) for name in ("bag", "along", "pull", "faded", "taught", "squares", "towards", "allowed")),
        *((name, c_void_p) for name in ("silent_part", "direction_fades", "normal", "means")),
        ("means_evidence", c_double),
        ("means_off", c_int64),
        ("reference", c_void_p),
        ("known", c_int64),
        *((name, c_void_p) for name in ("rows", "reference_along")),
        *((name, c_int64) for name in ("rows_known", "placed")),
        ("effect", c_void_p),
        *((name, c_int64) for name in ("sized", "drifted")),
        *((name, c_double) for name in ("sized_from", "threshold")),
    )


class SharedRunsView(Structure):
    """`SharedRuns` of tokens.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("tags", "counts", "lately", "fixed", "factors", "turns", "numbers")),
        ("vocabulary", c_int64),
    )


class EmbeddingView(Structure):
    """`Embedding` of tokens.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("table", "weights", "narrow")),
        *((name, c_int64) for name in ("vocabulary", "dimensions", "width")),
    )


class Native:
    """The functions; what each takes stands in the sources."""

    def __init__(self, path: Path) -> None:
        library, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        many = [c_void_p] * 16
        self.steps = library.loradock_drift_steps
        self.steps.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p]
        self.steps.restype = c_int64
        self.places = library.loradock_drift_places
        self.places.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p]
        self.places.restype = None
        self.gauge = library.loradock_drift_gauge
        self.gauge.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_double, c_void_p]
        self.gauge.restype = None
        self.evidence = short.loradock_drift_evidence
        self.evidence.argtypes, self.evidence.restype = [c_void_p, c_void_p, c_int64], c_double
        # Quicker than to give the interpreter away.
        self.fade_in = short.loradock_drift_fade_in
        self.fade_in.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_double]
        self.fade_in.restype = None
        self.learn = short.loradock_tokens_learn
        self.learn.argtypes, self.learn.restype = [c_void_p, c_void_p, c_int64, c_float, c_int64, *many[:5]], None
        self.own = short.loradock_tokens_own
        self.own.argtypes, self.own.restype = [c_void_p, c_float, c_int64, c_int64, *many[:9]], None
        self.features = short.loradock_tokens_features
        self.features.argtypes, self.features.restype = [c_void_p, c_void_p, c_int64, *many[:4]], None
        self.scores = short.loradock_tokens_scores
        self.scores.argtypes = [
            c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, *many[:3], c_int64, c_void_p, c_int64
        ]  # fmt: skip
        self.scores.restype = None


@cache
def native() -> Native | None:
    """Compiling takes some seconds, the first time on a machine."""
    try:
        path = compiled("drift", _SOURCES, _HEADERS)
        if path is not None:
            return Native(path)
        log.info("no C++ compiler for the watcher: numpy takes its place, at twice the cost; install g++")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("the watcher's C++ code cannot be had (%s): numpy takes its place, at twice the cost", error)
    return None


def at(array: NDArray) -> int:
    """The address of an array, which has to outlive the call."""
    try:
        return ctypes.addressof(_NOTHING.from_buffer(array))
    except (TypeError, ValueError):  # not in one piece, or not to be written: some times slower
        return array.ctypes.data


def lots_at(rng: np.random.Generator) -> int | None:
    """The address of a generator's `bitgen_t`."""
    address: int | None = rng.bit_generator.ctypes.bit_generator.value
    return address
