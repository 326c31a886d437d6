"""Servers of one registry tell one another, with each heartbeat, what keys have used: a key's limits hold over all.

No request asks anybody. Each server lets requests in by its own buckets, and takes out of them what others let in, a
beat or two later. So a key may get a beat's worth more at once where it asks several servers, and pays for it in the
same minute: over time no more passes than its limits say. How many of its requests are under way each server counts
for itself: that changes faster than beats come.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import msgspec

from serve.auth.rate_limits import Limits, Meters

log = logging.getLogger(__name__)

# A key that was not used for so long is not told of; and of more keys than these the latest used are told.
TOLD_SECONDS, TOLD_KEYS = 120.0, 500

Row = Mapping[str, Any]


class _Use(msgspec.Struct, array_like=True):
    """What a key has used since it is told of, and its limits a minute."""

    requests: int
    tokens: int
    requests_per_minute: int | None
    tokens_per_minute: int | None


class _Told(msgspec.Struct):
    """`run` is another one after each start: then all counts begin anew."""

    run: str
    keys: dict[str, _Use]


class SharedLimits:
    """Tells what the keys of `meters` have used here, and hears what they used elsewhere."""

    def __init__(self, meters: Meters, clock: Callable[[], float] = monotonic) -> None:
        self._meters = meters
        self._clock = clock
        self._run = uuid.uuid4().hex[:12]
        self._heard: dict[str, _Told] = {}

    def told(self) -> dict[str, Any]:
        """The column of this server's row."""
        now, every = self._clock(), self._meters.used()
        used = {key: meter for key, meter in every.items() if now - meter.used_at < TOLD_SECONDS}
        latest = sorted(used, key=lambda key: used[key].used_at, reverse=True)[:TOLD_KEYS]
        mine = {key: used[key] for key in latest}
        for key in every.keys() - mine.keys():
            every[key].forget_use()
        keys = {
            key: _Use(
                meter.used_requests,
                meter.used_tokens,
                meter.limits.requests_per_minute,
                meter.limits.tokens_per_minute,
            )
            for key, meter in mine.items()
        }
        return {"key_use": msgspec.json.encode(_Told(self._run, keys)).decode() if keys else None}

    def hear(self, others: Sequence[Row]) -> None:
        """The rows of the other servers that live."""
        rows = {row["id"]: told for row in others if (told := _read(row)) is not None}
        for id, told in rows.items():
            # Of a server that was not heard before nobody knows when it was used.
            if (before := self._heard.get(id)) is not None:
                self._take(told.keys, before.keys if before.run == told.run else {})
        self._heard = rows

    def _take(self, keys: Mapping[str, _Use], before: Mapping[str, _Use]) -> None:
        for key, use in keys.items():
            last = before.get(key)
            requests = use.requests - (last.requests if last else 0)
            tokens = use.tokens - (last.tokens if last else 0)
            if requests or tokens:
                limits = Limits(use.requests_per_minute, use.tokens_per_minute)
                self._meters.use_elsewhere(key, limits, requests, tokens)


def _read(row: Row) -> _Told | None:
    """What a server tells: nothing used, of one that tells nothing; None of one that tells it in another way."""
    if not row.get("key_use"):
        return _Told("", {})
    try:
        return msgspec.json.decode(row["key_use"], type=_Told)
    except msgspec.DecodeError as error:
        log.debug("what %s says of its keys cannot be read: %s", row["id"], error)
        return None
