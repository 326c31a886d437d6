"""How much a key may ask: token buckets with a clock that is handed in.

A bucket holds a minute's worth and fills evenly. A request takes one from the requests' bucket when it comes. What it
costs in tokens is known when it ends, so it may come while that bucket is not in debt, and pays afterwards: for every
token that the engine read and generated, however the answer ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from time import monotonic

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from serve.auth.body_memory import BodyMemory
from serve.errors import RateLimited

# Above this many meters, those that remember nothing are dropped.
_MANY = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """A key's limits; None is unlimited.

    `adapters` and `adapter_bytes` bound what the key's tenant keeps in all when the key pushes. `sequences` (`n` times
    prompts), `prompt_logprobs` and `batch` (inputs) bound one request, `changes_per_minute` and `reads_per_minute` what
    is no inference; None leaves these to the server's settings.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None
    sequences: int | None = None
    prompt_logprobs: int | None = None
    batch: int | None = None
    changes_per_minute: int | None = None
    reads_per_minute: int | None = None

    @property
    def meters(self) -> bool:
        """Requests with this key need a meter."""
        return (self.requests_per_minute, self.tokens_per_minute, self.concurrent) != (None, None, None)


LIMITS = tuple(field.name for field in fields(Limits))
UNLIMITED = Limits()


class Bucket:
    """Holds `per_minute`, fills at that rate, and may be in debt."""

    __slots__ = ("_level", "_seen", "capacity")

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = per_minute
        self._level = float(per_minute)
        self._seen = now

    def level(self, now: float) -> float:
        """What is in it."""
        self._level = min(self.capacity, self._level + (now - self._seen) * self.capacity / 60)
        self._seen = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take it, also when it is not there."""
        self._level = self.level(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, (min(amount, self.capacity) - self.level(now)) * 60 / self.capacity)


class Meter:
    """One key's use of its limits. `used_*` count what it used on this server."""

    __slots__ = ("_now", "_requests", "_running", "_tokens", "limits", "used_at", "used_requests", "used_tokens")

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._now = clock
        now = clock()
        self._requests = Bucket(limits.requests_per_minute, now) if limits.requests_per_minute is not None else None
        self._tokens = Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute is not None else None
        self._running = 0
        self.used_at = 0.0
        self.used_requests = 0
        self.used_tokens = 0

    @property
    def counts_tokens(self) -> bool:
        return self._tokens is not None

    @property
    def owes(self) -> bool:
        """No request would be let in now, for the tokens of those before it."""
        return self._tokens is not None and self._tokens.wait(1, self._now()) > 0

    @property
    def at_rest(self) -> bool:
        """A new meter would do the same."""
        now = self._now()
        full = [bucket.level(now) >= bucket.capacity for bucket in (self._requests, self._tokens) if bucket]
        return not self._running and all(full)

    @property
    def has_used(self) -> bool:
        """There is something to tell other servers."""
        return self.used_at > 0

    def forget_use(self) -> None:
        """What was used here begins at zero."""
        self.used_at = 0.0
        self.used_requests = 0
        self.used_tokens = 0

    def use_elsewhere(self, requests: int, tokens: int) -> None:
        """Another server let this much in."""
        now = self._now()
        if self._requests:
            self._requests.take(requests, now)
        if self._tokens:
            self._tokens.take(tokens, now)

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, from its arrival to its last byte; RateLimited when there is no room for it."""
        now = self._now()
        limits = self.limits
        if limits.concurrent is not None and self._running >= limits.concurrent:
            raise self._refusal(f"{limits.concurrent} requests of this key are under way, which is its limit", 1.0)
        if self._requests and (wait := self._requests.wait(1, now)):
            raise self._refusal(f"this key may send {limits.requests_per_minute} requests per minute", wait)
        if self._tokens and (wait := self._tokens.wait(1, now)):
            raise self._refusal(f"this key may use {limits.tokens_per_minute} tokens per minute", wait)
        if self._requests:
            self._requests.take(1, now)
            self._note(1, 0)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def give_back(self) -> None:
        """A request that is under way is another server's to count."""
        if self._requests:
            self._requests.take(-1, self._now())
            self._note(-1, 0)

    def charge(self, tokens: int) -> None:
        """A request turned out to have cost this much."""
        if self._tokens:
            self._tokens.take(tokens, self._now())
            self._note(0, tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit-* headers, as it stands now."""
        now = self._now()
        headers: dict[str, str] = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level(now))))
                headers[f"x-ratelimit-reset-{kind}"] = _duration(bucket.wait(bucket.capacity, now))
        return headers

    def _note(self, requests: int, tokens: int) -> None:
        self.used_requests += requests
        self.used_tokens += tokens
        self.used_at = self._now()

    def _refusal(self, reason: str, wait: float) -> RateLimited:
        after = max(1, math.ceil(wait))
        return RateLimited(f"{reason}; retry in {after} s", retry_after=after, headers=self.headers())


class RateLimitHeaders:
    """Puts the x-ratelimit-* headers on an answer that passes through `send`."""

    __slots__ = ("_meter", "_send")

    def __init__(self, send: Send, meter: Meter) -> None:
        self._send = send
        self._meter = meter

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            headers.update(self._meter.headers())
            message = {**message, "headers": headers.raw}
        await self._send(message)


class Meters:
    """The meter of each key that has limits; those without have none. As many as there are keys in use, at most.

    `bodies` has what the requests of all keys hold in memory. Where it is `shared` other servers are told what keys
    used here (serve.auth.shared_limits).
    """

    def __init__(
        self, clock: Callable[[], float] = monotonic, *, bodies: BodyMemory | None = None, shared: bool = False
    ) -> None:
        self.bodies = bodies or BodyMemory()
        self._clock = clock
        self._shared = shared
        self._meters: dict[str, Meter] = {}
        self._tidy_at = _MANY

    def of(self, key: str, limits: Limits) -> Meter | None:
        """The meter of this key, if it needs one."""
        if not limits.meters:
            return None
        meter = self._meters.get(key)
        if meter is None:
            if len(self._meters) >= self._tidy_at:
                self._meters = {kept: meter for kept, meter in self._meters.items() if not self._says_nothing(meter)}
                self._tidy_at = max(_MANY, 2 * len(self._meters))
            meter = self._meters[key] = Meter(limits, self._clock)
        elif meter.limits is not limits:
            meter.limits = limits  # another server knew less of them
        return meter

    def used(self) -> dict[str, Meter]:
        """The keys that have used something that other servers are to be told of."""
        return {key: meter for key, meter in self._meters.items() if meter.has_used}

    def use_elsewhere(self, key: str, limits: Limits, requests: int, tokens: int) -> None:
        """Another server let this much in. `limits` are what it says of them."""
        meter = self._meters.get(key) or self.of(key, limits)
        if meter is not None:
            meter.use_elsewhere(requests, tokens)

    def _says_nothing(self, meter: Meter) -> bool:
        return meter.at_rest and not (self._shared and meter.has_used)

    def __len__(self) -> int:
        return len(self._meters)


class RouteBudgets:
    """What each key may ask of the routes beside inference: changes and reads a minute, refused ones too.

    `changes` and `reads` are the budgets of keys that have none of their own.
    """

    def __init__(self, changes: int, reads: int, clock: Callable[[], float] = monotonic) -> None:
        self._defaults = {"changes": changes, "reads": reads}
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._tidy_at = _MANY

    def take(self, key: str, limits: Limits, kind: str) -> None:
        """One of the key's `changes` or `reads`; RateLimited, if there is none."""
        now, own = self._clock(), getattr(limits, f"{kind}_per_minute")
        budget = self._defaults[kind] if own is None else own
        bucket = self._buckets.get((key, kind))
        if bucket is None or bucket.capacity != budget:
            if len(self._buckets) >= self._tidy_at:
                self._buckets = {name: one for name, one in self._buckets.items() if one.level(now) < one.capacity}
                self._tidy_at = max(_MANY, 2 * len(self._buckets))
            bucket = self._buckets[key, kind] = Bucket(budget, now)
        if wait := bucket.wait(1, now):
            after = max(1, math.ceil(wait))
            raise RateLimited(f"this key may ask for {budget} {kind} a minute; retry in {after} s", retry_after=after)
        bucket.take(1, now)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 820ms, 6s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
