"""What the server does about a canary that does worse, or has proved itself: a policy for each adapter.

`policies` in the configuration has one for every adapter (`"*"`), and one for each adapter that needs another:

    policies:
      "*":
        worse: rollback       # or hold: it is not promoted; or notify
        proved: notify        # or promote
        canary_weight: 0      # 10%: a promote gives the version a tenth of the traffic first
        alpha: 0.01           # probability of a false verdict, ever, of one canary
        golden_min: 0         # 0.9: a version with a lower score on its golden set gets no traffic; 0 only reports
        validation: []        # all, or [questions, leaks]: which checks of a version must have passed before traffic
        train_on_traffic: false   # whether requests and answers are kept as examples to train it on
        guard: {}             # {prompt: NAME, answer: NAME, action: refuse}: models that look at them; or flag, count
        verdicts: {}          # {tenants: [acme], ratings_per_key: 10}: whose requests and ratings decide beside its own
        auto: false           # true: the model `auto` may choose it; default: it answers what fits no other
        loop: {}              # {on: [drift]}: it may train its next version by itself (serve.rollout.loop_policy)
      tone: {proved: promote, canary_weight: 0.1}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import ConfigError
from serve.names import tenant_of
from serve.rollout import loop_policy
from serve.rollout.loop_policy import DRIFT, LoopPolicy
from serve.rollout.validation import ALL, CHECKS

EVERY = "*"
NOTIFY = "notify"
HOLD = "hold"
ROLLBACK = "rollback"
PROMOTE = "promote"
REFUSE = "refuse"
FLAG = "flag"
COUNT = "count"
_ACTIONS = (REFUSE, FLAG, COUNT)
ANSWERS_THE_REST = "default"
_NUMBERS = ("canary_weight", "alpha", "golden_min")
_CHOICES = {"worse": (ROLLBACK, HOLD, NOTIFY), "proved": (NOTIFY, PROMOTE)}


@dataclass(frozen=True, slots=True)
class Guard:
    """The models that look at prompts and at answers, "" for none, and what follows when they flag one."""

    prompt: str = ""
    answer: str = ""
    action: str = REFUSE

    def __bool__(self) -> bool:
        return bool(self.prompt or self.answer)

    @property
    def withholds(self) -> bool:
        """What it would refuse is shown to no client: so nothing is that it has not looked at."""
        return bool(self) and self.action == REFUSE


@dataclass(frozen=True, slots=True)
class Say:
    """Who decides what becomes of an adapter's versions: its own tenant, and these.

    Other tenants' ratings count for nothing, and their requests within bounds. Twice `ratings_per_key` count of the
    ratings that came with one API key: of a canary and of the live version, as they come.
    """

    tenants: tuple[str, ...] = ()
    ratings_per_key: int = 10

    def has(self, adapter: str, tenant: str) -> bool:
        """The tenant has a say in the adapter of this full name."""
        return tenant == tenant_of(adapter) or tenant in self.tenants


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy of one adapter, or of all that have none of their own (`*`)."""

    adapter: str = EVERY
    worse: str = ROLLBACK
    proved: str = NOTIFY
    canary_weight: float = 0.0
    alpha: float = 0.01
    golden_min: float = 0.0
    validation: tuple[str, ...] = ()
    guard: Guard = Guard()
    verdicts: Say = Say()
    loop: LoopPolicy = LoopPolicy()
    train_on_traffic: bool = False
    auto: bool | str = False

    @property
    def at_once(self) -> Policy:
        """Nothing is held back and no canary comes first: somebody wants it all the same."""
        return replace(self, worse=NOTIFY, golden_min=0.0, validation=(), canary_weight=0.0)

    @property
    def proven(self) -> Policy:
        """No canary comes first: the version has been one, or what stands for it."""
        return replace(self, canary_weight=0.0)


DEFAULT_POLICIES = (Policy(),)
_NAMES = tuple(field.name for field in dataclasses.fields(Policy) if field.name != "adapter")


def parse(policies: Any) -> tuple[Policy, ...]:
    """The policies in the configuration; fields that an adapter's policy leaves out are those of `*`."""
    if not isinstance(policies, Mapping):
        raise ConfigError(f'policies takes adapters with their policy, as {{"*": {{worse: notify}}}}, not {policies!r}')
    every = _policy(Policy(), EVERY, policies.get(EVERY, {}))
    rest = [_policy(every, adapter, fields) for adapter, fields in policies.items() if adapter != EVERY]
    return (every, *rest)


class Policies:
    """The policy of each adapter, by its full name."""

    def __init__(self, policies: Sequence[Policy] = DEFAULT_POLICIES) -> None:
        self._own = {policy.adapter: policy for policy in policies}

    def __iter__(self) -> Iterator[Policy]:
        return iter(self._own.values())

    def __getitem__(self, adapter: str) -> Policy:
        return self._own.get(adapter) or self._own[EVERY]

    def watches(self, adapter: str, tenant: str) -> bool:
        """Requests of this tenant say whether the adapter of this full name drifts.

        Where drift opens a loop, which trains on its own tenant's requests alone, those of tenants without a say do
        not: they would spend what its tries may.
        """
        policy = self[adapter]
        return DRIFT not in policy.loop.on or policy.verdicts.has(adapter, tenant)

    def routes(self, adapter: str) -> bool:
        """Requests for `auto` may be the adapter's."""
        return bool(self[adapter].auto)


def _policy(base: Policy, adapter: Any, fields: Any) -> Policy:
    if not isinstance(adapter, str):
        raise ConfigError(f'policies takes an adapter\'s name, TENANT/NAME or "*", not {adapter!r}')
    if not isinstance(fields, Mapping) or not set(fields) <= set(_NAMES):
        raise ConfigError(f"the policy of {adapter} takes {', '.join(_NAMES)}, not {fields!r}")
    for name, choices in _CHOICES.items():
        if name in fields and fields[name] not in choices:
            raise ConfigError(f"the policy of {adapter}: {name} takes {' or '.join(choices)}, not {fields[name]!r}")
    if not isinstance(learns := fields.get("train_on_traffic", False), bool):
        raise ConfigError(f"the policy of {adapter}: train_on_traffic takes true or false, not {learns!r}")
    _check_auto(adapter, fields.get("auto", False))
    numbers = {name: _number(adapter, name, fields[name]) for name in _NUMBERS if name in fields}
    if not 0 <= numbers.get("canary_weight", 0) < 1:
        raise ConfigError(f"the policy of {adapter}: canary_weight takes 0 up to 1, not {fields['canary_weight']!r}")
    if not 0 < numbers.get("alpha", 0.01) < 1:
        raise ConfigError(f"the policy of {adapter}: alpha takes a probability, as 0.01, not {fields['alpha']!r}")
    if not 0 <= numbers.get("golden_min", 0) <= 1:
        raise ConfigError(
            f"the policy of {adapter}: golden_min takes a score from 0 to 1, not {fields['golden_min']!r}"
        )
    parsers = {"guard": _guard, "verdicts": _say, "validation": _validation}
    parts: dict[str, Any] = {name: parse(adapter, fields[name]) for name, parse in parsers.items() if name in fields}
    if "loop" in fields:
        parts["loop"] = loop_policy.parse(adapter, base.loop, fields["loop"])
    policy = replace(base, adapter=adapter, **{**fields, **numbers, **parts})
    if policy.loop.on and not policy.train_on_traffic:
        raise ConfigError(
            f"the policy of {adapter}: a loop learns from its traffic: add train_on_traffic: true, or no `on`"
        )
    return policy


def _check_auto(adapter: str, auto: Any) -> None:
    if not isinstance(auto, bool) and auto != ANSWERS_THE_REST:
        raise ConfigError(f"the policy of {adapter}: auto takes true, false or default, not {auto!r}")
    if adapter == EVERY and auto == ANSWERS_THE_REST:
        raise ConfigError(f"the policy of {EVERY}: one adapter is auto's default: say so in its own policy")


def _guard(adapter: str, fields: Any) -> Guard:
    names = [field.name for field in dataclasses.fields(Guard)]
    if not isinstance(fields, Mapping) or not set(fields) <= set(names) or not _are_texts(fields.values()):
        raise ConfigError(f"the policy of {adapter}: guard takes {', '.join(names)}, each a text, not {fields!r}")
    if (action := fields.get("action", REFUSE)) not in _ACTIONS:
        raise ConfigError(f"the policy of {adapter}: guard.action takes {' or '.join(_ACTIONS)}, not {action!r}")
    return Guard(**fields)


def _validation(adapter: str, checks: Any) -> tuple[str, ...]:
    names = [checks] if checks == ALL else checks
    if not isinstance(names, list | tuple) or not set(map(str, names)) <= {ALL, *CHECKS}:
        raise ConfigError(
            f"the policy of {adapter}: validation takes all, or a list of {', '.join(CHECKS)}, not {checks!r}"
        )
    return tuple(names)


def _say(adapter: str, fields: Any) -> Say:
    names = [field.name for field in dataclasses.fields(Say)]
    if not isinstance(fields, Mapping) or not set(fields) <= set(names):
        raise ConfigError(f"the policy of {adapter}: verdicts takes {', '.join(names)}, not {fields!r}")
    tenants, count = fields.get("tenants", []), fields.get("ratings_per_key", Say().ratings_per_key)
    if not isinstance(tenants, list | tuple) or not _are_texts(tenants):
        raise ConfigError(f"the policy of {adapter}: verdicts.tenants takes a list of tenants, not {tenants!r}")
    if type(count) is not int or count < 0:
        raise ConfigError(f"the policy of {adapter}: verdicts.ratings_per_key takes a whole number, not {count!r}")
    return Say(tuple(tenants), count)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _number(adapter: str, name: str, value: Any) -> float:
    try:
        if isinstance(value, str) and value.endswith("%"):
            return float(value.removesuffix("%")) / 100
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the policy of {adapter}: {name} takes a number, as 0.1 or 10%, not {value!r}") from error
