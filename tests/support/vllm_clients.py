"""Operators that were written for vLLM's runtime LoRA API: the requests of each one's own client, in its order."""

from __future__ import annotations

import httpx

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def aibrix_loads(http: httpx.AsyncClient, name: str, artifact: str) -> bool:
    """AIBrix: pkg/controller/modeladapter/lora_client.go `LoadAdapter` (commit 0e92423): False, if it was there."""
    if name in {card["id"] for card in (await http.get("/v1/models")).json()["data"]}:
        return False
    answer = await http.post(LOAD, json={"lora_name": name, "lora_path": artifact})
    assert answer.status_code in (200, 201), answer.text
    return True


async def aibrix_unloads(http: httpx.AsyncClient, name: str) -> None:
    """`UnloadAdapter` there."""
    answer = await http.post(UNLOAD, json={"lora_name": name})
    assert answer.status_code in (200, 404), answer.text


class ProductionStack:
    """production-stack: operator/internal/controller/loraadapter_controller.go (commit 0c2b361)."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def registrations(self) -> set[str]:
        """Its adapters, from the list of models."""
        cards = (await self.http.get("/v1/models")).json()["data"]
        return {card["id"] for card in cards if card["parent"] is not None}

    async def loads(self, name: str, path: str) -> None:
        assert (await self.http.post(LOAD, json={"lora_name": name, "lora_path": path})).status_code == 200

    async def unloads(self, name: str) -> None:
        assert (await self.http.post(UNLOAD, json={"lora_name": name})).status_code == 200


async def kubeai_asks(http: httpx.AsyncClient, path: str, **body: str) -> bool:
    """KubeAI: internal/vllmclient/client.go (commit 1f338f6): anything above 299 is an error with a JSON body."""
    answer = await http.post(path, json=body)
    if answer.status_code > 299:
        assert answer.json()["error"], answer.text
    return answer.status_code <= 299
