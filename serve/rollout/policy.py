"""What the server does by itself about a version that does worse, or has proved itself, by adapter.

`policies` in the configuration says it for every adapter (`"*"`) and, where one needs another, for that one:

    policies:
      "*":
        worse: rollback       # or hold: it is not promoted; or notify
        proved: notify        # or promote
        canary_weight: 0      # 0.1: a promote gives the version a tenth of the traffic first
        alpha: 0.01           # probability of a false verdict, ever, of one canary
      tone: {proved: promote, canary_weight: 0.1}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from serve.errors import ConfigError

EVERY = "*"
NOTIFY, HOLD, ROLLBACK, PROMOTE = "notify", "hold", "rollback", "promote"
_CHOICES = {"worse": (ROLLBACK, HOLD, NOTIFY), "proved": (NOTIFY, PROMOTE)}


@dataclass(frozen=True, slots=True)
class Policy:
    """Of one adapter, or of every other (`*`)."""

    adapter: str = EVERY
    worse: str = ROLLBACK
    proved: str = NOTIFY
    canary_weight: float = 0.0
    alpha: float = 0.01


DEFAULT_POLICIES = (Policy(),)
_NAMES = tuple(field.name for field in fields(Policy) if field.name != "adapter")


def parse(given: Any) -> tuple[Policy, ...]:
    """The policies that the configuration says; what one does not say is as it is for every adapter."""
    if not isinstance(given, Mapping):
        raise ConfigError(f'policies takes adapters with their policy, as {{"*": {{worse: notify}}}}, not {given!r}')
    every = _policy(Policy(), EVERY, given.get(EVERY, {}))
    rest = [_policy(every, adapter, said) for adapter, said in given.items() if adapter != EVERY]
    return (every, *rest)


def policy_for(policies: Sequence[Policy], adapter: str) -> Policy:
    """The policy of the adapter of this full name."""
    by_name = {policy.adapter: policy for policy in policies}
    return by_name.get(adapter) or by_name[EVERY]


def _policy(base: Policy, adapter: Any, said: Any) -> Policy:
    if not isinstance(adapter, str):
        raise ConfigError(f'policies takes an adapter\'s name, TENANT/NAME or "*", not {adapter!r}')
    if not isinstance(said, Mapping) or not set(said) <= set(_NAMES):
        raise ConfigError(f"the policy of {adapter} takes {', '.join(_NAMES)}, not {said!r}")
    for name, choices in _CHOICES.items():
        if name in said and said[name] not in choices:
            raise ConfigError(f"the policy of {adapter}: {name} takes {' or '.join(choices)}, not {said[name]!r}")
    numbers = {name: _number(adapter, name, said[name]) for name in ("canary_weight", "alpha") if name in said}
    if not 0 <= numbers.get("canary_weight", 0) < 1:
        raise ConfigError(f"the policy of {adapter}: canary_weight takes 0 up to 1, not {said['canary_weight']!r}")
    if not 0 < numbers.get("alpha", 0.01) < 1:
        raise ConfigError(f"the policy of {adapter}: alpha takes a probability, as 0.01, not {said['alpha']!r}")
    return replace(base, adapter=adapter, **{**said, **numbers})


def _number(adapter: str, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the policy of {adapter}: {name} takes a number, not {value!r}") from error
