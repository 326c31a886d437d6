"""Who an answer is for: whose turn it waits for, whose key it is charged to, and where usage shows it.

Every lease names its payer, and what the engine computes under a lease is accounted when it ends, however it ends. So
the tokens that an engine computed are the tokens that somebody was charged, or that are named as the operator's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from serve.asgi.exchange import Generation
from serve.auth.auth import Caller
from serve.auth.rate_limits import Meter, Meters

# Whose work is nobody's but the server's own; no tenant can have this name.
OPERATOR = "(operator)"


class Cause(StrEnum):
    """What an answer is for."""

    REQUEST = "request"  # a client's own
    BATCH = "batch"
    MODERATION = "moderation"
    GUARD = "guard"
    GOLDEN = "golden"
    JUDGE = "judge"
    REPLAY = "replay"
    BASELINE = "baseline"
    SHADOW = "shadow"
    LOOP = "loop"
    PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Payer:
    """A tenant, what for, and the meter of the key that is charged: None for a key without limits, and for no key."""

    tenant: str
    cause: Cause
    meter: Meter | None

    @classmethod
    def of(cls, caller: Caller, cause: Cause, meters: Meters) -> Payer:
        """Whoever asks, with their key."""
        return cls(caller.tenant, cause, meters.of(caller.key, caller.limits))

    @property
    def owes(self) -> bool:
        """The key has used its tokens of this minute: what can wait, waits."""
        return self.meter is not None and self.meter.owes

    def because(self, cause: Cause) -> Payer:
        """The same one, for something else."""
        return replace(self, cause=cause)


# What the server asks by itself to know its own state.
PROBES = Payer(OPERATOR, Cause.PROBE, None)


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine did for one answer. `adapter` is a full name, or a base's; `began` the wall-clock time."""

    payer: Payer
    adapter: str
    began: float
    generations: tuple[Generation, ...]
