"""vLLM's runtime LoRA API and SageMaker's adapter routes, over versions: a load is a push, an unload ends what is live.

Answers are those of vLLM 0.32 (vllm/entrypoints/openai/models/serving.py and its package
model_hosting_container_standards), but for a name that is loaded already: there vLLM asks for `load_inplace` and
replaces weights under running answers; here it gets a new version. What vLLM does not know of, such as a tensor that
does not fit, is refused as by `POST /v1/adapters`.
"""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from serve.adapters.adapter import ABSENT, Adapter
from serve.adapters.registry.registry import Registry
from serve.adapters.sources.address import address_of
from serve.api.health import Health
from serve.api.incoming import Incoming, fetched
from serve.api.json_body import JsonBody, decoded
from serve.api.parts import TheConfig, TheFleet, TheHealth, TheIncoming, TheLifecycle, TheRegistry, TheRemoval
from serve.api.removal import Removal
from serve.api.routes.callers import Expected, Manager, owned
from serve.api.schemas import Fetch, LoadLora, RegisterAdapter, UnloadLora
from serve.asgi.answer_headers import VERSION, version_tag
from serve.auth.auth import Caller
from serve.config import Config
from serve.engine.fleet import Fleet
from serve.errors import AdapterRejected, BadRequest, NotFound
from serve.names import shown, spelled, tenant_of
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.retention import LOADED_FROM

ALIAS_HEADER = "x-amzn-sagemaker-adapter-alias"

router = APIRouter()


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(
    request: Request,
    caller: Manager,
    expected: Expected,
    fleet: TheFleet,
    config: TheConfig,
    health: TheHealth,
    incoming: TheIncoming,
    body: Annotated[LoadLora, JsonBody(LoadLora)],
) -> Response:
    """vLLM's: `lora_path` becomes a version of `lora_name`, and live; an address as in `POST /v1/adapters`, or a path.

    A path lies below one of the server's `source_roots`; `org/repo` is the hub's. The adapter may change nothing, as a
    LoRA does before its training. With or without `load_inplace`, a name that is loaded gets another version.
    """
    answer = await _loaded(request, fleet, config, health, incoming, caller, body, expected)
    if isinstance(answer, Response):
        return answer
    done = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(done, headers={VERSION: version_tag(answer.name, answer.version, caller.tenant)})


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    lifecycle: TheLifecycle,
    removal: TheRemoval,
    body: Annotated[UnloadLora, JsonBody(UnloadLora)],
) -> Response:
    """vLLM's: the name answers 404 from now on. Its versions stay; a load, a promote or a rollback brings it back.

    Of the names that were loaded by path and unloaded, the newest `keep_unloaded` of a tenant stay.
    """
    if not body.lora_name:
        return _error(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
    return await _unloaded(
        request, registry, lifecycle, removal, caller, body.lora_name, expected
    ) or PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/adapters", response_class=PlainTextResponse)
async def register_adapter(
    request: Request,
    caller: Manager,
    expected: Expected,
    fleet: TheFleet,
    lifecycle: TheLifecycle,
    config: TheConfig,
    health: TheHealth,
    incoming: TheIncoming,
) -> Response:
    """SageMaker's: load `src` as `name`, and pin it if `pin` says so; as JSON, or in the query."""
    asked = decoded(await request.body(), RegisterAdapter) if await request.body() else _from_query(request)
    load = LoadLora(asked.name, asked.src)
    answer = await _loaded(request, fleet, config, health, incoming, caller, load, expected)
    if isinstance(answer, Response):
        return answer
    if asked.pin:
        await lifecycle.pin(answer.name, by=caller.name)
    headers = {VERSION: version_tag(answer.name, answer.version, caller.tenant)}
    return PlainTextResponse(f"Adapter {_alias(request, asked.name)} registered", headers=headers)


@router.delete("/adapters/{name:path}", response_class=PlainTextResponse)
async def unregister_adapter(
    name: str,
    request: Request,
    caller: Manager,
    expected: Expected,
    registry: TheRegistry,
    lifecycle: TheLifecycle,
    removal: TheRemoval,
) -> Response:
    """SageMaker's: as `/v1/unload_lora_adapter`."""
    return await _unloaded(request, registry, lifecycle, removal, caller, name, expected) or PlainTextResponse(
        f"Adapter {_alias(request, name)} unregistered"
    )


async def _loaded(
    request: Request,
    fleet: Fleet,
    config: Config,
    health: Health,
    incoming: Incoming,
    caller: Caller,
    body: LoadLora,
    expected: int | None,
) -> Adapter | Response:
    """The version that a load made, or vLLM's answer to one that it refuses."""
    request.state.subject = shown(body.lora_name)
    if not body.lora_name or not body.lora_path:
        return _error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    if body.lora_name in fleet:
        conflict = f"The lora adapter '{body.lora_name}' conflicts with a served base model."
        return _error(400, "InvalidUserInput", conflict)
    if body.is_3d_lora_weight:
        raise BadRequest(
            "is_3d_lora_weight is not taken: adapters of fused experts cannot be served beside others",
            param="is_3d_lora_weight",
        )
    health.check_started()
    address = address_of(body.lora_path)
    asked = Fetch(body.lora_name, address, why=f"from {address}", probe=False)
    async with incoming.quarantined(caller) as (folder, room):
        try:
            came = await fetched(address, folder, room, config, caller)
        except AdapterRejected as error:
            if error.code != ABSENT:
                raise
            missing = f"Loading lora {shown(body.lora_name)} failed: No adapter found for {shown(body.lora_path)}"
            return _error(404, "NotFoundError", missing)
        notes = {LOADED_FROM: shown(address, 500)}
        adapter, _ = await incoming.admit(caller, asked, folder, expected=expected, came=came, notes=notes)
    request.state.subject = adapter.tag
    return adapter


async def _unloaded(
    request: Request,
    registry: Registry,
    lifecycle: Lifecycle,
    removal: Removal,
    caller: Caller,
    name: str,
    expected: int | None,
) -> Response | None:
    """vLLM's answer for a name that is not loaded; None once it is unloaded."""
    request.state.subject = shown(spelled(name, caller.tenant))
    try:
        full = owned(registry, name, caller)
        adapter = await lifecycle.unload(full, by=caller.name, expected=expected)
    except NotFound:
        return _error(404, "NotFoundError", f"The lora adapter '{shown(name)}' cannot be found.")
    request.state.subject = adapter.tag
    await removal.unloaded(caller, tenant_of(full))
    return None


def _from_query(request: Request) -> RegisterAdapter:
    query = request.query_params
    switches = {name: query[name].lower() == "true" for name in ("preload", "pin") if name in query}
    return RegisterAdapter(query.get("name", ""), query.get("src", ""), **switches)


def _alias(request: Request, name: str) -> str:
    return shown(request.headers.get(ALIAS_HEADER) or name)


def _error(status: int, kind: str, message: str) -> JSONResponse:
    """An error as vLLM says it: its `code` is the status."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)
