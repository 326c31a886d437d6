"""Service level objectives: how much of an adapter's traffic may be slow or fail.

`slos` in the configuration says them for every adapter (`"*"`) and, where one needs another, for that one:

    slos:
      "*":
        time_to_first_token: {threshold: 2.5, target: 0.95}
        inter_token_latency: {threshold: 0.25, target: 0.95}
        errors: {target: 0.995}
      tone:
        time_to_first_token: {threshold: 1, target: 0.99}
        inter_token_latency: off

A threshold is a bucket bound of the histogram that it is about: between two bounds nobody can count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from serve.errors import ConfigError

# Upper bounds of the histograms' buckets, in seconds.
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

EVERY = "*"
# The fastest alert fires when the budget of 30 days burns this many times too fast; with a larger budget than its
# inverse even a total failure would not burn so fast, and the alert could never fire.
FASTEST_BURN = 14.4

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Objective(StrEnum):
    FIRST_TOKEN = "time_to_first_token"
    INTER_TOKEN = "inter_token_latency"
    ERRORS = "errors"

    @property
    def bounds(self) -> Sequence[float]:
        """What a threshold may be; nothing for errors."""
        return {Objective.FIRST_TOKEN: FIRST_TOKEN_SECONDS, Objective.INTER_TOKEN: INTER_TOKEN_SECONDS}.get(self, ())


@dataclass(frozen=True, slots=True)
class Slo:
    """At least `target` of what `adapter` does stays below `threshold` seconds; for errors, succeeds. 0 is no SLO."""

    adapter: str
    objective: Objective
    target: float = 0
    threshold: float | None = None

    @property
    def budget(self) -> float:
        """The part that may go wrong."""
        return round(1 - self.target, 9)


DEFAULT_SLOS = (
    Slo(EVERY, Objective.FIRST_TOKEN, 0.95, 2.5),
    Slo(EVERY, Objective.INTER_TOKEN, 0.95, 0.25),
    Slo(EVERY, Objective.ERRORS, 0.995),
)


def parse(given: Any) -> tuple[Slo, ...]:
    """The SLOs that the configuration says: the defaults, and over them what is `given`."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            'slos takes adapters with their objectives, as {"*": {errors: {target: 0.99}}}, ' + _not(given)
        )
    objectives_of = {(slo.adapter, slo.objective): slo for slo in DEFAULT_SLOS}
    for adapter, objectives in given.items():
        if adapter != EVERY and not (isinstance(adapter, str) and _NAME.fullmatch(adapter)):
            raise ConfigError(f'slos takes an adapter\'s name, TENANT/NAME or "*", not {adapter!r}')
        if not isinstance(objectives, Mapping):
            raise ConfigError(f"slos for {adapter} takes objectives ({', '.join(Objective)}), {_not(objectives)}")
        for name, limits in objectives.items():
            if name not in list(Objective):
                raise ConfigError(f"slos for {adapter} takes the objectives {', '.join(Objective)}, {_not(name)}")
            objective = Objective(name)
            off = limits in (None, False)
            objectives_of[adapter, objective] = Slo(adapter, objective) if off else _slo(adapter, objective, limits)
    return tuple(objectives_of.values())


def exempt(slos: Sequence[Slo], objective: Objective) -> list[str]:
    """The adapters to which what holds for every adapter does not apply: they have their own, or none."""
    return sorted(slo.adapter for slo in slos if slo.objective is objective and slo.adapter != EVERY)


def _slo(adapter: str, objective: Objective, limits: Any) -> Slo:
    where = f"the SLO {objective} for {adapter}"
    wanted = {"target", "threshold"} if objective.bounds else {"target"}
    if not isinstance(limits, Mapping) or set(limits) != wanted:
        raise ConfigError(f"{where} takes {' and '.join(sorted(wanted))}, or off, {_not(limits)}")
    target = _number(limits["target"], f"{where}: target")
    if not 1 - 1 / FASTEST_BURN < target < 1:
        raise ConfigError(
            f"{where} takes a target above {1 - 1 / FASTEST_BURN:.3f} and below 1, as 0.99, not {target}: "
            "a lower one leaves so large a budget that no failure is fast enough to page anybody"
        )
    if not objective.bounds:
        return Slo(adapter, objective, target)
    threshold = _number(limits["threshold"], f"{where}: threshold")
    if threshold not in objective.bounds:
        bounds = ", ".join(f"{bound:g}" for bound in objective.bounds)
        raise ConfigError(
            f"{where} takes a bucket bound of its histogram as its threshold ({bounds}), {_not(threshold)}"
        )
    return Slo(adapter, objective, target, threshold)


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} takes a number, {_not(value)}") from error


def _not(value: Any) -> str:
    return f"not {value!r}"
