"""A balancer before servers on this machine: each connection goes to the next of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from tests.support.proxy import Proxy, Upstream


def balancer(ports: Sequence[int]) -> Proxy:
    """`with balancer([8000, 8001]) as door`: `door.port` leads to one after the other."""
    turns = itertools.cycle(ports)

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", next(turns))

    upstream: Upstream = connect
    return Proxy(upstream)
