"""`"model": "auto"`: the adapter that is asked such prompts answers, as far as the references that drift keeps say.

    auto                of all adapters whose policy says `auto: true`, as far as the key may ask them
    auto:sql-*          of those with such a name; auto:support/* of those of the tenant support

A prompt goes to the adapter whose reference it fits best (`serve.gateway.prompt_fit`), if it fits that one better than
the next by MARGIN, and is no stranger to it than all but few of its own. The base's reference is among them, with a
PRIOR: what it is asked by name stands for all that is no adapter's. Until it has one, the mean of the adapters' own
does: less of what is foreign is told by that. What fits none is answered by the adapter whose
policy says `auto: default`, or by the base. A conversation is judged by its first message, as references are made
of first messages: so all of it goes to one adapter, and nothing has to be remembered.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.adapters.adapter import Adapter
from serve.asgi.exchange import AutoChoice
from serve.asgi.messages import first_message
from serve.auth.auth import Caller
from serve.drift.features.last_turn import last_turn
from serve.drift.reference_counts import Counts, ReferenceCounts
from serve.errors import BadRequest, NotFound
from serve.gateway.fan_out import GENERATE
from serve.gateway.prompt_fit import PromptFit, Rest
from serve.gateway.request import RESPONSES, InferenceRequest
from serve.gateway.router import Router, sees
from serve.names import DEFAULT, short_name, shown, tenant_of
from serve.rollout.policy import ANSWERS_THE_REST, Policies

Text = TypeVar("Text", str, list[Any])

AUTO = "auto"
# In nats: the best fit is e times as probable as the next, and a prompt is taken for twenty times as likely to be none
# of an adapter's as to be a given adapter's. What that is worth was counted with `make auto`.
MARGIN = 1.0
PRIOR = math.log(20)
# In standard deviations of an adapter's own prompts.
STRANGEST = 2.5
FITS, CLOSE, FOREIGN, NO_TEXT, NO_REFERENCE = REASONS = ("fits", "close", "foreign", "no_text", "no_reference")
# Adapters that take part, the first by name.
MOST_ADAPTERS = 256
# Characters, or tokens, of a prompt that are looked at, half of them at its end.
MOST = 1024
MAX_PATTERN = 200
# Of callers' tenants and patterns, what is worked out for them.
MOST_SCOPES = 100
MARGINS = (0.5, 1, 2, 4, 8, 16, 32, 64)
_PATHS = frozenset(
    ("/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/messages", "/v1/messages/count_tokens", "/tokenize")
) | {GENERATE}


@dataclass(frozen=True, slots=True, eq=False)
class _Scope:
    """Whom a caller's `auto` may choose: the places in `fit`, and who answers the rest. prior: of each, in nats. rest:
    what stands for what is no adapter's, where the base has no reference."""

    default: str
    fit: PromptFit | None
    places: NDArray[np.intp]
    prior: NDArray[np.float32]
    rest: Rest | None


class Auto(Collector):
    """`submit` has a job run by the watcher's thread. For the event loop, but for `collect`."""

    def __init__(
        self, router: Router, policies: Policies, fits: ReferenceCounts, submit: Callable[[Callable[[], None]], None]
    ) -> None:
        self._router = router
        self._registry = router.registry
        self._fleet = router.fleet
        self._policies = policies
        self._fits = fits
        self._submit = submit
        # Whom there is to choose from, until the registry or a reference changes.
        self._key = (-1, -1)
        self._names: dict[str, None] = {}
        self._defaults: list[str] = []
        self._by_base: dict[str, PromptFit] = {}
        self._scopes: dict[tuple[str, bool, str], _Scope] = {}
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._margins = [0] * (len(MARGINS) + 1)
        self._margin_sum = 0.0

    def settle(self, request: InferenceRequest, path: str, caller: Caller) -> AutoChoice | None:
        """Have the request name the one model that is to answer; what `auto` chose, if that was asked."""
        request.settle(partial(self._first, caller=caller))
        if not self._is_meant(request.model, caller):
            return None
        if self._router.forwarding is not None:
            raise BadRequest(
                "auto needs the references of all adapters on one server, and the servers of this registry have homes "
                "for them: name the model",
                param="model",
            )
        scope = self._scope(caller, _pattern(request.model))
        name, choice = self._chosen(scope, _tokens(request.fields, path, scope.fit), caller)
        request.route_to(name)
        return choice

    def look(self) -> None:
        """Have the references read of all that take part."""
        self._refresh()

    def is_there(self, caller: Caller) -> bool:
        """The caller may ask for it."""
        with suppress(NotFound):
            return self._is_meant(AUTO, caller) and bool(self._scope(caller, ""))
        return False

    def takes_part(self, full: str) -> str:
        """Whether this adapter does: no; gathering, until it has a reference; yes, or default."""
        self._refresh()
        if full not in self._names:
            return "no"
        if full in self._defaults:
            return "default"
        return "yes" if any(full in fit.adapters for fit in self._by_base.values()) else "gathering"

    def _first(self, models: Sequence[str | None], caller: Caller) -> str | None:
        """Of several models the one that answers: `auto` exists, and comes in its turn."""
        for place, model in enumerate(models):
            if self._is_meant(model, caller):
                there = [name for name in models[:place] if name is None or self._router.knows(name, caller)]
                if there:
                    return self._router.chosen(there, caller)
                with suppress(NotFound):
                    self._scope(caller, _pattern(model))
                    return model
        return self._router.chosen(models, caller)

    def _is_meant(self, model: str | None, caller: Caller) -> bool:
        """An adapter or a base of that name has it."""
        return model is not None and model.partition(":")[0] == AUTO and not self._router.knows(AUTO, caller)

    def _chosen(self, scope: _Scope, tokens: ArrayLike | None, caller: Caller) -> tuple[str, AutoChoice]:
        """The model's name, and what is said of the choice."""
        margin, best = None, scope.default
        if scope.fit is None or not len(scope.places):
            reason = NO_REFERENCE
        elif tokens is None or not np.size(tokens):
            reason = NO_TEXT
        else:
            nats, strangeness = scope.fit(tokens)
            nats = nats + scope.prior
            order = scope.places[np.argsort(nats[scope.places])]
            place = int(order[-1])
            others = [nats[order[-2]]] if len(order) > 1 else []
            others += [scope.rest(tokens)] if scope.rest else []
            if others:
                margin = float(nats[place] - max(others))
            is_foreign = scope.prior[place] or strangeness[place] > STRANGEST or (margin or 0) < 0
            reason = FOREIGN if is_foreign else FITS
            if margin is not None and margin < MARGIN and reason == FITS:
                reason = CLOSE
            best = scope.fit.adapters[place] if reason == FITS else scope.default
        self._count(best, reason, margin)
        return self._public(best, caller), AutoChoice(short_name(best, caller.tenant), reason, margin)

    def _scope(self, caller: Caller, pattern: str) -> _Scope:
        if len(pattern) > MAX_PATTERN:
            raise BadRequest(f"a pattern behind auto: has up to {MAX_PATTERN} characters", param="model")
        self._refresh()
        key = (caller.tenant, caller.operator, pattern)
        if key not in self._scopes:
            if len(self._scopes) >= MOST_SCOPES:
                self._scopes.clear()
            self._scopes[key] = self._scope_of(caller, pattern)
        return self._scopes[key]

    def _scope_of(self, caller: Caller, pattern: str) -> _Scope:
        def may(full: str) -> bool:
            if full in self._fleet:
                return True
            names = (full, short_name(full, caller.tenant))
            return sees(self._registry, caller, full) and (
                not pattern or any(fnmatchcase(name, pattern) for name in names)
            )

        # The caller's own default comes before another tenant's.
        defaults = sorted(filter(may, self._defaults), key=lambda full: (tenant_of(full) != caller.tenant, full))
        base = self._fleet.of(defaults[0]).name if defaults else self._fleet.first.name
        fit = self._by_base.get(base)
        if not any(map(may, self._names)):
            called = f" called `{shown(pattern, 80)}`" if pattern else ""
            raise NotFound(
                f"The model `{AUTO}` does not exist here: no live adapter{called} that this key may ask takes part; "
                "the policy of those that do says `auto: true`.",
                code="model_not_found",
                param="model",
            )
        known = fit.adapters if fit else ()
        places = np.array([place for place, full in enumerate(known) if may(full)], np.intp)
        prior = np.array([PRIOR if full in self._fleet else 0 for full in known], np.float32)
        alone = len(places) < 2 or prior[places].any()
        rest = None if fit is None or alone else fit.rest(places.tolist())
        return _Scope(defaults[0] if defaults else base, fit, places, prior, rest)

    def _public(self, full: str, caller: Caller) -> str:
        """A name that means this adapter, or base, to the caller, whatever the caller's own are called."""
        foreign = full not in self._fleet and tenant_of(full) == DEFAULT != caller.tenant
        return f"{DEFAULT}/{full}" if foreign else full

    def _refresh(self) -> None:
        """See who takes part now; have what is kept of them found, where nobody has looked yet."""
        key = (self._registry.generation, self._fits.changes)
        if key == self._key:
            return
        self._key = key
        self._scopes = {}
        known: dict[str, list[Counts]] = {}
        taking = (name for name in self._registry.names() if self._policies[name].auto and self._registry.live(name))
        self._names = dict.fromkeys(islice(taking, MOST_ADAPTERS))
        self._defaults = [name for name in self._names if self._policies[name].auto == ANSWERS_THE_REST]
        for base in self._fleet if self._names else ():
            if counts := self._fits.of(base.name):
                known[base.name] = [counts]
            elif self._fits.is_missing(base.name):
                self._submit(partial(self._fits.find, [(base.name, "base", "")]))
        for name in self._names:
            versions = self._newest_first(name)
            if counts := next((counts for its in versions if (counts := self._fits.of(its.id))), None):
                known.setdefault(self._fleet.of(name).name, []).append(counts)
            if self._fits.is_missing(versions[0].id):
                told = [(its.name, f"v{its.version}", its.id) for its in versions]
                self._submit(partial(self._fits.find, told))
        fits = {base: self._by_base.get(base) for base in known}
        self._by_base = {
            base: fit if (fit := fits[base]) and fit.counts == tuple(counts) else PromptFit(counts)
            for base, counts in known.items()
        }

    def _newest_first(self, name: str) -> list[Adapter]:
        """The live version, then the others: what one of them is asked, another was."""
        live = self._registry.live(name)
        versions = sorted(self._registry.versions(name), key=lambda its: (its != live, -its.version))
        return versions[:8]

    def _count(self, adapter: str, reason: str, margin: float | None) -> None:
        with self._lock:
            if (adapter, reason) not in self._counts:
                # Prometheus does not see the growth of a counter that is born with its first event.
                self._counts.update({(adapter, each): 0 for each in REASONS})
            self._counts[adapter, reason] += 1
            if margin is not None:
                self._margins[bisect_left(MARGINS, margin)] += 1
                self._margin_sum += margin

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "loradock_auto_requests",
            "Requests for the model auto, by who answers, and why: fits, or close, foreign, no_text, no_reference, "
            "where the default does.",
            labels=("adapter", "reason"),
        )
        with self._lock:
            counts = dict(self._counts)
            margins, total = list(self._margins), self._margin_sum
        for labels, count in counts.items():
            family.add_metric(labels, count)
        yield family
        bounds = [*map(str, MARGINS), "+Inf"]
        sums = np.add.accumulate(margins).tolist()
        yield HistogramMetricFamily(
            "loradock_auto_margin_nats",
            "By how much the prompts of such requests fit the best adapter better than the next one.",
            buckets=list(zip(bounds, sums, strict=True)),
            sum_value=total,
        )


def _pattern(model: str | None) -> str:
    return (model or "").partition(":")[2]


def _tokens(fields: Mapping[str, Any], path: str, fit: PromptFit | None) -> ArrayLike | None:
    """What the first message says, or the prompt; None of what is no text. BadRequest, where there is none to go by."""
    if path not in _PATHS:
        raise BadRequest(f"auto goes by a prompt, and {path} has none: name the model", param="model")
    if fields.get("previous_response_id") is not None:
        raise BadRequest(
            "auto goes by the first message, which a request with previous_response_id does not hold: name the model "
            "that answered before (its `model`)",
            param="model",
        )
    prompt = fields.get("prompt", fields.get("token_ids"))
    if isinstance(prompt, list) and not isinstance(prompt[0] if prompt else 0, int):
        if len(prompt) > 1:
            raise BadRequest("auto goes by one prompt: send each in a request of its own", param="prompt")
        prompt = prompt[0]
    if fit is None:
        return None
    if (said := first_message(fields)) is not None:
        return fit.text.tokens(_ends(said))
    tokens = fit.text.tokens(_ends(prompt)) if isinstance(prompt, str) else prompt
    looked_at = _ends(tokens) if isinstance(tokens, list) else []
    if not all(type(token) is int for token in looked_at):
        return None
    return last_turn(None, looked_at, fit.text).tokens


def _ends(text: Text) -> Text:
    """What is looked at of a text, or of its tokens."""
    half = MOST // 2
    return text if len(text) <= MOST else text[:half] + text[-half:]
