"""A captured conversation is deleted: here, from what loops hold, and through here on the server that kept it."""

from __future__ import annotations

import asyncio

from serve.dataset.datasets import Datasets
from serve.errors import NotFound
from serve.fleet.server_messages import Claim, Content
from serve.loop.loops import Loops
from serve.names import tenant_of

# The kind of the messages that ask it of another server.
DELETE = "delete"


class Deletion:
    """Of conversations with the adapters of one tenant, which this server keeps some of."""

    def __init__(self, datasets: Datasets, loops: Loops) -> None:
        self._datasets = datasets
        self._loops = loops

    async def delete(self, adapter: str, key: str, id: str) -> dict[str, object]:
        """Delete a conversation, by its id or that of one of its answers, as whoever has this API key means it: its id,
        and how many requests it had; NotFound."""
        gone = await self._datasets.forget(adapter, key, id)
        forget = self._loops.forget_conversation
        await asyncio.to_thread(forget, tenant_of(adapter), gone.conversation, gone.lines)
        return {"id": gone.conversation, "requests": gone.requests}

    async def delete_referenced(self, adapter: str, id: str) -> bool:
        """Have loops forget a conversation that is kept no more; whether one held it."""
        return bool(await asyncio.to_thread(self._loops.forget_conversation, tenant_of(adapter), id))

    async def delete_for_another(self, content: Content, claim: Claim) -> Content | None:
        """Delete what another server was asked to, whose client's key it has looked at."""
        try:
            return await self.delete(content["adapter"], content["key"], content["id"])
        except NotFound:
            return None
