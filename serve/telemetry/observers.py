"""Whoever looks at a finished exchange, one after the other, on the event loop; what they take of it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from serve.asgi.exchange import Exchange


class ExchangeObservers:
    def __init__(self, observers: Sequence[Callable[[Exchange], None]], measure: Callable[[float], None]) -> None:
        self._observers = tuple(observers)
        self._measure = measure

    def take(self, exchange: Exchange) -> None:
        began = time.perf_counter()
        for observe in self._observers:
            observe(exchange)
        self._measure(time.perf_counter() - began)
