"""Signals that earlier releases wrote, as today's: what they know of the scores that are left goes on.

    state = current(kind, state, dimensions)       # a `Signal.state()` of any release

There every number of a vector was a score, and counts of frequent tokens helped to learn directions; three histograms
bet on each score besides the fixed bets. Reference, bags and the fixed bets of the scores that are left are the same,
so that a version is watched all the time. What is left out had a part of the evidence; a mean of what stays is as good
an evidence.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from serve.drift.detector.bets import FIXED
from serve.drift.features.features import LOGPROB, PROMPTS, names
from serve.drift.features.token_surprise import NAMES
from serve.drift.state_arrays import below, prefixed

State = Mapping[str, NDArray]
# What today's have, and earlier ones had not.
LAYOUT = "layout"
_HISTOGRAMS = 3  # of each score


def current(kind: str, state: State, dimensions: int) -> State:
    """The same of one that is current already."""
    if not state or LAYOUT in state:
        return state
    lead, own = len(names(kind)), len(names(kind)) + dimensions
    behind = list(range(own, own + len(NAMES))) if "surprise.spread" in state else []
    scores = [*range(lead), *([] if kind == LOGPROB else behind)]
    columns = [*range(own if kind in PROMPTS else lead), *behind]
    if kind == LOGPROB:
        columns = [*range(own + 2)]
    kept = {name: value for name, value in state.items() if not name.startswith(("detector.", "common."))}
    for name in ("gathered", "rows"):
        if kept.get(name, np.zeros(0)).size:
            kept[name] = kept[name][:, columns]
    if "scale.matrix" not in state:
        return kept
    kept["scale.centre"] = state["scale.centre"][columns]
    kept["scale.matrix"] = state["scale.matrix"][np.ix_(columns, scores)]
    if "structure.sum" in state:
        kept = {name: value for name, value in kept.items() if not name.startswith("structure.")}
        kept |= prefixed(_structure(below(state, "structure."), scores), "structure.")
    return kept | prefixed(_detector(below(state, "detector."), scores), "detector.")


def _structure(state: State, scores: list[int]) -> dict[str, NDArray]:
    kept = {"numbers": state["numbers"], "sum": state["sum"][scores]}
    wander = below(state, "wander.")
    if wander and (there := np.isin(wander["scores"], scores)).any():
        kept |= prefixed({name: value[there] for name, value in wander.items()}, "wander.")
        kept["wander.scores"] = np.searchsorted(scores, kept["wander.scores"])
    return kept


def _detector(state: State, scores: list[int]) -> dict[str, NDArray]:
    k = len(state["bags"])
    kept = {name: state[name] for name in ("threshold", "counts", "lots")}
    kept |= {name: state[name][scores] for name in ("bags", "moved")}
    kept["reference"] = state["reference"][:, scores]
    kept["weights"] = state.get("weights", np.ones(k))[scores]
    kept["margin"] = state.get("margin", np.zeros(k))[scores]
    # Still earlier ones looked for the size of an effect after the evidence alone, which was sure then.
    kept["stages"] = state.get("stages", np.array([state["counts"][2] >= 0] * 2))
    kept |= prefixed(_bets(below(state, "bank."), k, scores), "bank.")
    return kept | prefixed(below(state, "means."), "means.")


def _bets(state: State, k: int, scores: list[int]) -> dict[str, NDArray]:
    histograms, own = len(state["unit"]), k * _HISTOGRAMS
    kept = {}
    for name in ("r", "page", "start"):
        if len(state[name]) > histograms:
            kept[name] = state[name][histograms : histograms + k * FIXED].reshape(k, FIXED)[scores].ravel()
        else:  # before there were fixed bets: each begins where the strongest histogram of the score is
            kept[name] = state[name][:own].reshape(k, _HISTOGRAMS)[scores, _strongest(state, k)[scores]].repeat(FIXED)
    if len(state["r"]) <= histograms:
        kept["r"] = state["r"][:own].reshape(k, _HISTOGRAMS).mean(axis=1)[scores].repeat(FIXED)
    return kept


def _strongest(state: State, k: int) -> NDArray[np.intp]:
    return state["page"][: k * _HISTOGRAMS].reshape(k, _HISTOGRAMS).argmax(axis=1)
