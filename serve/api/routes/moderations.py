"""OpenAI's moderations, answered by a guard model or adapter of this server."""

import asyncio
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Request

from serve.api.json_body import JsonBody
from serve.api.parts import TheMeters, TheModerator
from serve.api.routes.callers import Asker
from serve.api.schemas import Moderations, TextPart
from serve.engine.payer import Cause, Payer
from serve.gateway.moderation import Verdict

router = APIRouter()


@router.post("/v1/moderations")
async def moderate(
    request: Request,
    caller: Asker,
    meters: TheMeters,
    guard_model: TheModerator,
    body: Annotated[Moderations, JsonBody(Moderations, strict=True)],
) -> dict[str, Any]:
    """Which categories a text falls into, or each of several texts; parts of one input are one text.

    `model` names the guard; without one, or with a name of OpenAI's, `moderation_model` does. A score is 1 or 0.
    """
    request.state.audited = False
    moderator = guard_model
    payer = Payer.of(caller, Cause.MODERATION, meters)
    asking = [asyncio.create_task(moderator.judge(caller, payer, text, body.model)) for text in _texts(body)]
    try:
        verdicts = await asyncio.gather(*asking)
    finally:
        for task in asking:
            task.cancel()
    return {
        "id": f"modr-{secrets.token_hex(12)}",
        "model": verdicts[0].model,
        "results": [_described(verdict, moderator.categories) for verdict in verdicts],
    }


def _texts(body: Moderations) -> list[str]:
    if isinstance(body.input, str):
        return [body.input]
    if any(isinstance(part, TextPart) for part in body.input):
        return ["\n".join(part.text if isinstance(part, TextPart) else part for part in body.input)]
    return [str(text) for text in body.input]


def _described(verdict: Verdict, categories: tuple[str, ...]) -> dict[str, Any]:
    return {
        "flagged": verdict.flagged,
        "categories": {name: name in verdict.categories for name in categories},
        "category_scores": {name: float(name in verdict.categories) for name in categories},
        "category_applied_input_types": {name: ["text"] for name in categories},
    }
