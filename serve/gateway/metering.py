"""A request counts against its key's limits from its arrival to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.asgi.exchange import Watch
from serve.auth.rate_limits import Meter


@contextmanager
def metered(meter: Meter | None, watch: Watch) -> Iterator[None]:
    """A request that counts against the key's limits, if it has any, and is charged for its tokens when it ends."""
    if meter is None:
        yield
        return
    with meter.request():
        try:
            yield
        finally:
            meter.charge(watch.tokens)
