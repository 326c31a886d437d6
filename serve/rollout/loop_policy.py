"""When an adapter's loop may try to make its next version, and what that version has to show (docs/loop.md).

policies:
  tone:
    loop:
      on: [drift, schedule, ratings]   # what opens a try; none: the loop is off
      every: 7d                        # of `schedule`: since the last try
      min_examples: 500                # of new traffic, the held-out ones too
      held_out: 0.3                    # the part of them that the gate asks and nobody trains on
      budget: 4                        # tries in a calendar month (UTC)
      wait: 1d                         # after a try that came to nothing; each further one in a row twice as long
      gate: {tolerance: 0.05, alpha: 0.05, golden: 0.1}
      canary: 0.1                      # the candidate's share of traffic before it is promoted; 0: no canary
      canary_for: 7d                   # so long it may take to prove itself
      promote: ask                     # or auto
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import ConfigError
from serve.sequential.betting import needed_for_proof

DRIFT, SCHEDULE, RATINGS = CAUSES = ("drift", "schedule", "ratings")
ASK, AUTO = "ask", "auto"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])")


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """`tolerance`: of the likelihood of an answer, from 0 to 1; `golden`: of the golden score. `alpha`: probability
    that the loop promotes in a month a version that is worse by more than these."""

    tolerance: float = 0.05
    alpha: float = 0.05
    golden: float = 0.1


@dataclass(frozen=True, slots=True)
class LoopPolicy:
    """The loop of one adapter. Durations in seconds."""

    on: tuple[str, ...] = ()
    every: float = 7 * 86_400.0
    min_examples: int = 500
    held_out: float = 0.3
    budget: int = 4
    wait: float = 86_400.0
    gate: GatePolicy = GatePolicy()
    canary: float = 0.1
    canary_for: float = 7 * 86_400.0
    promote: str = ASK

    @property
    def share(self) -> float:
        """Of alpha, what one try of a month may spend."""
        return self.gate.alpha / self.budget

    @property
    def needed(self) -> int:
        """Examples that each part of the gate needs, or nothing could be proved on it."""
        return needed_for_proof(self.gate.tolerance, self.share)


_NAMES = tuple(field.name for field in dataclasses.fields(LoopPolicy))
_GATE = tuple(field.name for field in dataclasses.fields(GatePolicy))


def parse(adapter: str, base: LoopPolicy, fields: Any) -> LoopPolicy:
    """`base` with what the configuration says; ConfigError for what it cannot say."""
    where = f"the loop of {adapter}"
    if isinstance(fields, Mapping) and True in fields:
        fields = {"on" if name is True else name: value for name, value in fields.items()}  # YAML 1.1 reads `on` so
    if not isinstance(fields, Mapping) or not set(fields) <= set(_NAMES):
        raise ConfigError(f"{where} takes {', '.join(_NAMES)}, not {fields!r}")
    read: dict[str, Any] = {
        name: _READ[name](f"{where}: {name}", value) for name, value in fields.items() if name != "gate"
    }
    if "gate" in fields:
        read["gate"] = _gate(where, base.gate, fields["gate"])
    policy = replace(base, **read)
    held_out = int(policy.min_examples * policy.held_out)
    if policy.on and held_out < policy.needed:
        raise ConfigError(
            f"{where}: {policy.min_examples} examples with held_out {policy.held_out:g} hold out {held_out}, and "
            f"{policy.needed} are needed to prove that a version is no worse by {policy.gate.tolerance:g} at alpha "
            f"{policy.gate.alpha:g} over {policy.budget} tries: raise min_examples, held_out or gate.tolerance"
        )
    return policy


def _gate(where: str, base: GatePolicy, fields: Any) -> GatePolicy:
    if not isinstance(fields, Mapping) or not set(fields) <= set(_GATE):
        raise ConfigError(f"{where}: gate takes {', '.join(_GATE)}, not {fields!r}")
    return replace(base, **{name: _between(f"{where}: gate.{name}", value) for name, value in fields.items()})


def _causes(where: str, value: Any) -> tuple[str, ...]:
    causes = [value] if isinstance(value, str) else value
    if not isinstance(causes, list | tuple) or not all(cause in CAUSES for cause in causes):
        raise ConfigError(f"{where} takes a list of {', '.join(CAUSES)}, not {value!r}")
    return tuple(dict.fromkeys(causes))


def _duration(where: str, value: Any) -> float:
    match = _DURATION.fullmatch(str(value).strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else _number(value)
    if seconds is None or not 0 < seconds < 1e10:
        raise ConfigError(f"{where} takes a duration, as 7d, 12h, 30m or seconds, not {value!r}")
    return seconds


def _between(where: str, value: Any) -> float:
    number = _number(value)
    if number is None or not 0 < number < 1:
        raise ConfigError(f"{where} takes a number between 0 and 1, not {value!r}")
    return number


def _half(where: str, value: Any) -> float:
    number = _number(value)
    if number is None or not 0 < number <= 0.5:
        raise ConfigError(f"{where} takes a number from above 0 to 0.5, not {value!r}")
    return number


def _share(where: str, value: Any) -> float:
    number = _number(value)
    if number is None or not 0 <= number < 1:
        raise ConfigError(f"{where} takes 0 up to 1, not {value!r}")
    return number


def _count(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where} takes a whole number from 1 up, not {value!r}")
    return value


def _promote(where: str, value: Any) -> str:
    if value not in (ASK, AUTO):
        raise ConfigError(f"{where} takes {ASK} or {AUTO}, not {value!r}")
    return str(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


_READ = {
    "on": _causes,
    "every": _duration,
    "min_examples": _count,
    "held_out": _half,
    "budget": _count,
    "wait": _duration,
    "canary": _share,
    "canary_for": _duration,
    "promote": _promote,
}
