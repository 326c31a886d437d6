"""Mixtures that are kept: a weighted sum of adapters becomes a version, with the checks and the history of any."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.adapters.file_thread import in_turn
from serve.adapters.mixing.mixture import parse_part
from serve.adapters.mixing.pruning import CAT, Pruning
from serve.adapters.mixing.stacking import stack
from serve.api.json_body import JsonBody
from serve.api.parts import TheFleet, TheHealth, TheIncoming, TheRegistry, TheRouter, TheStore
from serve.api.routes.callers import Expected, Manager, described
from serve.api.schemas import Fetch, Mix
from serve.asgi.answer_headers import version_tag
from serve.errors import Forbidden
from serve.gateway.router import manages
from serve.names import short_name, spelled

router = APIRouter()


@router.post(
    "/v1/adapters/{name:path}/mix",
    status_code=201,
    responses={200: {"description": "These bytes are a version already"}},
)
async def mix(
    name: str,
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    fleet: TheFleet,
    resolver: TheRouter,
    store: TheStore,
    incoming: TheIncoming,
    health: TheHealth,
    body: Annotated[Mix, JsonBody(Mix)],
) -> Response:
    """Make the weighted sum of adapters a version of `name`, as a push of its files would.

    Each part is NAME, NAME@VERSION, or either with a weight: `tone:0.7`, `legal@v2:-0.5`. The rank of the mixture is
    the sum of theirs; by `ties`, `dare_linear` or `dare_ties` it is that of the matrices themselves. Parts must be
    adapters that the caller may change: whoever has the mixture has their weights.
    """
    health.check_started()
    request.state.subject = spelled(name, caller.tenant)
    mixture = resolver.mixture([parse_part(part) for part in body.adapters], caller)
    for part in mixture.parts:
        if not manages(caller, part.adapter.name):
            raise Forbidden(
                f"{short_name(part.adapter.name, caller.tenant)} is another tenant's: it may be asked in a mixture, "
                "and not be kept in one"
            )
    base = fleet.of(mixture.parts[0].adapter.name)
    max_rank = base.backend.max_lora_rank
    # 32 bits a number at most where there were 16; pruned ones have the rank of their matrices.
    room = 2 * mixture.nbytes * (1 if body.method == CAT else max(1, max_rank // mixture.rank))
    async with incoming.quarantined(caller, room) as (folder, _):
        parts = [(await store.bring(part.adapter.digest), part.weight) for part in mixture.parts]
        digests = tuple(part.adapter.digest for part in mixture.parts)
        pruning = Pruning(body.method, body.density, digests, max_rank)
        await in_turn(stack, parts, folder, None if body.method == CAT else pruning)
        pushed = Fetch(
            name, "", promote=body.promote, why=body.why or f"mix of {', '.join(body.adapters)}", engine=base.name
        )
        notes = {
            "mixture": [
                {"adapter": version_tag(part.adapter.name, part.adapter.version, caller.tenant), "weight": part.weight}
                for part in mixture.parts
            ],
            **({} if body.method == CAT else {"mixed_by": {"method": body.method, "density": body.density}}),
        }
        adapter, created = await incoming.admit(caller, pushed, folder, expected=expected, notes=notes)
    request.state.subject = adapter.tag
    return JSONResponse(described(registry, fleet, adapter, caller), status_code=201 if created else 200)
