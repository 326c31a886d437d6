"""What a trainer that was written for vLLM's development server asks beside loads and answers."""

from typing import Any

from fastapi import APIRouter, Request

from serve.api.parts import TheFleet
from serve.api.routes.callers import Asker, Manager
from serve.errors import BadRequest

router = APIRouter()


@router.get("/server_info")
async def server_info(caller: Asker, fleet: TheFleet) -> dict[str, Any]:
    """vLLM's, as far as a trainer of adapters needs it: what the first engine takes of adapters.

    `data_parallel_size` is 1 with any number of ranks: in vLLM a load reaches one rank, here all of them.
    """
    backend = fleet.first.backend
    lora = {
        "max_lora_rank": backend.max_lora_rank,
        "max_loras": backend.slots,
        "max_cpu_loras": backend.max_resident,
    }
    model: dict[str, Any] = {"model": fleet.first.name}
    if fleet.first.is_ready:
        model["max_model_len"] = backend.max_model_len
    return {"vllm_config": {"model_config": model, "lora_config": lora, "parallel_config": {"data_parallel_size": 1}}}


@router.post("/pause")
async def pause(request: Request, caller: Manager, mode: str = "keep") -> dict[str, str]:
    """vLLM's, for a trainer that pauses around a load (`mode=keep`). Nothing waits: a load changes no answer under way.

    Other modes would abort other clients' answers, and are refused.
    """
    request.state.audited = False
    if mode != "keep":
        raise BadRequest(
            f"mode {mode[:40]!r} is not taken: the answers under way are other clients' too; take mode=keep, or load "
            "the adapter without a pause",
            param="mode",
        )
    return {"status": "running", "message": "nothing waits: a version's weights never change, so none need to"}


@router.post("/resume")
async def resume(request: Request, caller: Manager) -> dict[str, str]:
    """vLLM's, after a pause. There was none."""
    request.state.audited = False
    return {"status": "resumed"}
