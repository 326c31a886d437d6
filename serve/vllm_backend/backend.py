"""One engine of vLLM's with its OpenAI server, under our names: start, stop, adapters, probes.

vLLM is pinned exactly; tests/serve/vllm_backend/test_backend.py names each internal that is used here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import load_chat_template
from vllm.sampling_params import SamplingParams
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.version import __version__ as VLLM_VERSION

from serve.adapters.added_tokens import Tokenizer
from serve.adapters.saved_modules import Head
from serve.cpu_kernels import pages
from serve.cpu_kernels.install import VARIABLE, WEIGHTS
from serve.engine.engine import LOW_PRIORITY, engine_priority
from serve.errors import AdapterRejected, BadRequest, ConfigError, Conflict, EngineUnavailable
from serve.models import engine_memory, hardware
from serve.names import response_owner
from serve.vllm_backend import announce, building, first_error, forkserver, gpu_memory
from serve.vllm_backend.adapter_tokenizers import AdapterTokenizers, BaseTokens
from serve.vllm_backend.chat_template import check_ends, guard
from serve.vllm_backend.classification import Classifications, parameters, read_head, scores
from serve.vllm_backend.coalescing import Coalescing
from serve.vllm_backend.detokenizer import TokenTexts
from serve.vllm_backend.engine_arguments import parse
from serve.vllm_backend.engine_processes import (
    Member,
    cause_of_death,
    end,
    members,
    private_bytes,
    processes_of,
    resident_bytes,
)
from serve.vllm_backend.output_processor import OWN, Outputs
from serve.vllm_backend.patches import applying, response_models, response_store, titles
from serve.vllm_backend.patches.error_translation import answer_unknown_paths, rejecting, sentence
from serve.vllm_backend.patches.tokenizer_copies import shared_copy
from serve.vllm_backend.structured_outputs import Engine
from serve.vllm_backend.vllm_metrics import CpuSteps, Patches, Pulse, own_series
from serve.vllm_backend.worker_extension import LOADED, LOADING

log = logging.getLogger(__name__)

T = TypeVar("T")
# Seconds until the first look at whether the workers have read an adapter. A look is a call of all workers between two
# steps, so the longer it takes the fewer there are: each waits for a part of the time that has gone by, up to a pause.
LOAD_POLL, LOAD_PART = 0.005, 1 / 8
LOAD_PAUSE = 0.1
# vLLM closes its sockets in a callback of the event loop.
SOCKETS_CLOSE = 0.1
# The engine after whose start this process's heap was taken out of the garbage collector's sight.
_FROZEN: list[str] = []


class VLLMBackend:
    """One AsyncLLM and vLLM's own OpenAI app over it. Built from options that are checked at once, started later."""

    version = VLLM_VERSION

    def __init__(self, model: str, name: str, options: Mapping[str, Any], coalesce_ms: float = 0.0) -> None:
        self.name = name
        self._coalesce_ms = coalesce_ms
        self.model = model
        self._options = options
        self.args = parse(model, name, options)
        self._collectors = CollectorRegistry()
        self._pulse = Pulse()
        self._cpu_steps = CpuSteps(name)
        self._collectors.register(self._cpu_steps)
        self._collectors.register(Patches(name, applying.states))
        # What is awaited of the engine beside answers, and since when there is anything to wait for.
        self._calls: set[asyncio.Future[Any]] = set()
        self._idle_until = time.monotonic()
        self._elder: Callable[[], VLLMBackend | None] = lambda: None  # beside which it starts
        self._llm: Engine | None = None
        self._app: ASGIApp | None = None
        # Workers of a tensor-parallel engine among them, which nobody else knows of once the first process is dead.
        self._members: frozenset[Member] = frozenset()
        self._loras: dict[str, LoRARequest] = {}
        self._generates = False
        # It answers `previous_response_id`: vLLM keeps responses if VLLM_ENABLE_RESPONSES_API_STORE=1.
        self.keeps_responses = False
        self._seats = 0
        self.weights = ""  # what is multiplied, in words, known once it has started
        self._probes = itertools.count(1)
        self.tokens: Tokenizer = BaseTokens(self._engine)
        self._reader: Any = None
        self._tokenizers: AdapterTokenizers | None = None
        # Of adapters that classify.
        self._heads: dict[str, Head] = {}

    @property
    def max_lora_rank(self) -> int:
        return int(self.args.max_lora_rank)

    @property
    def max_resident(self) -> int:
        """Adapters that the engine keeps in host memory, slots included."""
        return int(self.args.max_cpu_loras or self.args.max_loras)

    @property
    def max_model_len(self) -> int:
        return int(self._engine().model_config.max_model_len)

    @property
    def app(self) -> ASGIApp:
        """vLLM's OpenAI surface; knows the base by its name and adapters by the ids that `add` was given."""
        if self._app is None:
            raise EngineUnavailable("the engine is starting; retry shortly")
        return self._app

    @property
    def running(self) -> int:
        """Clients' requests that the engine has not finished."""
        return len(self._unfinished()) - self.background

    @property
    def background(self) -> int:
        """The server's own requests that the engine has not finished: probes, shadows, rehearsals."""
        return sum(state.background for state in self._unfinished())

    def _unfinished(self) -> list[Any]:
        return list(self._llm.output_processor.request_states.values()) if self._llm else []

    @property
    def slots(self) -> int:
        """Adapters that one batch may hold."""
        return int(self.args.max_loras)

    @property
    def patches(self) -> Mapping[str, str]:
        """What is changed in vLLM, by the patch's name; with a reason, it is off."""
        return {name: state.reason for name, state in applying.states().items()}

    @property
    def seats(self) -> int:
        """Requests that it works on at a time, known once it has started; those beyond wait in its own queue."""
        return self._seats

    @property
    def ranks(self) -> int:
        """Data-parallel copies of the model, each with its own batch, slots and prefix cache."""
        return int(self.args.data_parallel_size or 1)

    @property
    def prioritizes(self) -> bool:
        """Its own queue goes by priority."""
        return bool(self.args.scheduling_policy == "priority")

    @property
    def waiting(self) -> int:
        """Requests in the engine's own queue, as of its last step."""
        return self._pulse.waiting if self._unfinished() else 0

    @property
    def memory(self) -> int:
        """Bytes of memory of the engine's processes, what they share counted once for each."""
        return sum(resident_bytes(pid) for pid in self._pids())

    @property
    def dead(self) -> bool:
        return self._llm is not None and self._llm.errored

    @property
    def cause(self) -> str:
        """Why it is dead."""
        return cause_of_death(self._processes())

    @property
    def stalled(self) -> float:
        """Seconds since the engine last moved, while something waits for it; to be asked every now and then."""
        now = time.monotonic()
        if not self._unfinished() and not self._calls:
            self._idle_until = now
        return now - max(self._pulse.last, self._idle_until)

    def check_room(self) -> None:
        """Conflict, if this machine has no room for one more engine like this."""
        try:
            if not hardware.on_cpu():
                gpu_memory.check(self.args)
                return
            if self.args.kv_cache_memory_bytes is None:
                return
            weights, slots, cache = self._sizes()
            elder = self._elder()
            hardware.check_memory(weights, cache, slots=slots, before=elder.untaken() if elder else 0)
        except ConfigError as error:
            raise Conflict(
                f"there is no room for a second engine beside the first, only after it (drain_first): {error}"
            ) from error

    def another(self, model: str | None = None) -> VLLMBackend:
        """One more with the same options, over the same model or another; not started."""
        made = VLLMBackend(model or self.model, self.name, self._options, self._coalesce_ms)
        made._elder = weakref.ref(self)
        return made

    def untaken(self) -> int:
        """Bytes of a CPU's KV cache that the engine takes once tokens lie there."""
        if self._llm is None or self.args.kv_cache_memory_bytes is None:
            return 0
        weights, slots, cache = self._sizes()
        taken = sum(private_bytes(pid) for pid in self._pids())
        return max(0, min(cache, weights + slots + cache - taken))

    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of weights, of adapters' slots and of the KV cache on a CPU."""
        folder = Path(self.model)
        fused = hardware.fused_step(os.environ.get(VARIABLE, "auto"))
        weights = engine_memory.weights(folder, os.environ.get(WEIGHTS, "auto"), fused)
        slots = engine_memory.slots(folder, self.slots, self.max_lora_rank)
        return self.ranks * weights, self.ranks * slots, self.ranks * int(self.args.kv_cache_memory_bytes or 0)

    async def start(self) -> None:
        """Load the base model; minutes for a large one. The event loop stays free meanwhile."""
        announce.loading(self.name, self.model, self.args, VLLM_VERSION)
        forkserver.ensure()
        try:
            self._llm = llm = await building.built(self._build, _discard)
            self._members = members(self._pids())
            self._take_outputs(llm)
            tasks = await llm.get_supported_tasks()
            self._generates = "generate" in tasks
            self._seats = self.ranks * int(llm.vllm_config.scheduler_config.max_num_seqs)
            app = build_app(self.args, tasks, llm.model_config)
            first_error.install(app)
            answer_unknown_paths(app, self.name, tasks)
            # Where vLLM's error handler would ask for the server's end once the engine is dead.
            app.state.server = SimpleNamespace(should_exit=False)
            if self._generates:
                guard(llm.renderer)
                await check_ends(llm.renderer, self._chat_params(), self.name)
            await init_app_state(llm, app.state, self.args, tasks)
            if self._generates:
                self._tokenizers = AdapterTokenizers(llm.renderer)
                outputs = cast(Outputs, llm.output_processor)
                outputs.tokenizers, outputs.heads = self._tokenizers, self._heads
            responses = getattr(app.state, "openai_serving_responses", None)  # a pooling model has none
            self.keeps_responses = response_store.bound(responses, response_owner)
        except EngineDeadError as error:
            raise ConfigError("the engine died while it started: the log says why") from error
        except (ValueError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"the engine cannot start with this model and these options: {sentence(error)}"
            ) from error
        self._loras = app.state.openai_serving_models.lora_requests
        self._app = Classifications(app, self._heads.get, self._classify) if self._generates else app
        warned = [message for messages in await self._rpc("loradock_notices") for message in messages]
        model = llm.vllm_config.model_config
        kept = str(model.quantization or model.dtype).removeprefix("torch.")
        packed = sorted({each for each in await self._rpc("loradock_weights") if each})
        self.weights = ", ".join(packed) or f"{kept}, in vLLM's layers"
        announce.loaded(self.name, llm.vllm_config, self.slots, warned)
        if not _FROZEN:  # later, answers are under way, and it takes a while
            _FROZEN.append(self.name)
            freeze_gc_heap()
        await self._rpc("loradock_settle")
        pages.release()

    def _chat_params(self) -> ChatParams:
        """With which a template is rendered unless a request says otherwise, as vLLM has them."""
        return ChatParams(
            chat_template=load_chat_template(self.args.chat_template),
            chat_template_content_format=self.args.chat_template_content_format,
            chat_template_kwargs=self.args.default_chat_template_kwargs or {},
        )

    def _take_outputs(self, llm: Engine) -> None:
        """Have what the engine says come by us."""
        llm.output_processor.__class__ = Outputs
        outputs = cast(Outputs, llm.output_processor)
        outputs.plain = self._tells_plainly()
        outputs.parses = applying.is_on("parsed-streams") and self._adds_nothing()
        outputs.calls_tools = bool(self.args.enable_auto_tool_choice)
        outputs.step_times = self._pulse.step_times
        outputs.counts_drafts = llm.vllm_config.speculative_config is None
        if applying.is_on("token-table"):
            outputs.texts = TokenTexts.of(outputs.tokenizer)
        if applying.is_on("step-stats") and llm.logger_manager is not None:
            outputs.lean_stats = True
            self._pulse.observe_waits(llm.logger_manager.stat_loggers)
        if applying.is_on("response-models"):
            response_models.install()
        if self._coalesce_ms:
            outputs.coalescing = Coalescing(self._coalesce_ms / 1000)

    def _tells_plainly(self) -> bool:
        """vLLM's server puts nothing between the tokens of a plain stream, and takes nothing out."""
        args = self.args
        parser = ToolParserManager.get_tool_parser(args.tool_call_parser) if args.tool_call_parser else None
        rewrites = args.reasoning_parser or getattr(parser, "engine_based_streaming", False)
        return applying.is_on("fast-stream") and self._adds_nothing() and not rewrites

    def _adds_nothing(self) -> bool:
        """vLLM's server tells nothing of its own between the pieces of a stream."""
        args = self.args
        return not (args.enable_force_include_usage or args.enable_log_outputs or args.sse_keep_alive_interval > 0)

    def _build(self) -> Engine:
        engine_args = AsyncEngineArgs.from_cli_args(self.args)
        prepare()
        with own_series(self._collectors):
            os.environ[titles.ENGINE] = self.name  # its processes are named after it
            if not self.args.otlp_traces_endpoint:
                # They would trace how they load, each with an exporter of its own; this server has its own by now.
                os.environ.pop("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", None)
            engine = Engine.from_engine_args(
                engine_args,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[lambda config, index: self._pulse],
            )
            return cast(Engine, engine)

    async def stop(self, *, kill: bool = False) -> None:
        """End the engine's processes; `kill` does not ask them, for one that is dead or does not answer."""
        llm = self._llm
        app = self._app
        self._llm = None
        self._app = None
        for call in tuple(self._calls):
            call.cancel()
        if llm is None:
            return
        if llm.output_handler is not None:
            # It would take the end of the engine that it listens to for an accident, and say so at length.
            llm.output_handler.cancel()
        llm.output_processor.propagate_error(EngineDeadError())
        llm.grammars.close()
        if kill:
            building.kill(processes_of(llm))
        if set(multiprocessing.active_children()) - set(processes_of(llm)):
            forkserver.leave()
        await asyncio.to_thread(llm.shutdown)
        await asyncio.to_thread(end, self._members)
        # What vLLM leaves to the garbage collector, which looks at nothing that was there when the heap was frozen:
        # the context of its sockets with nine descriptors, and all that hangs on the app.
        await asyncio.sleep(SOCKETS_CLOSE)
        # Nobody waits for it: were a socket still open, this would never return.
        threading.Thread(target=llm.engine_core.resources.ctx.destroy, args=(0,), daemon=True).start()
        if app is not None:
            cast(Any, getattr(app, "app", app)).state._state.clear()

    def _processes(self) -> list[Any]:
        return processes_of(self._llm) if self._llm else []

    def _pids(self) -> set[int]:
        return building.family(self._processes())

    async def _call(self, asked: Awaitable[T]) -> T:
        """An answer of the engine beside those to requests. vLLM leaves who waits for one of a dead engine waiting."""
        call = asyncio.ensure_future(asked)
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            if self._llm is None and not _cancelling():
                raise EngineUnavailable("the engine stopped; retry shortly") from None
            raise
        finally:
            call.cancel()
            self._calls.discard(call)

    async def add(self, adapter_id: str, number: int, path: Path) -> None:
        """Bring an adapter into the engine under a name and number that were never used before."""
        request = LoRARequest(lora_name=adapter_id, lora_int_id=number, lora_path=str(path), base_model_name=self.name)
        if self._tokenizers is not None:
            await asyncio.to_thread(self._tokenizers.add, adapter_id, path, self.tokens)
            if head := await asyncio.to_thread(read_head, path):
                self._heads[adapter_id] = head
        with rejecting():
            await self._rpc("loradock_begin", adapter_id, number, str(path))
            began = time.monotonic()
            while LOADING in (states := await self._rpc("loradock_finish", number)):
                await asyncio.sleep(min(max(LOAD_POLL, LOAD_PART * (time.monotonic() - began)), LOAD_PAUSE))
        if reason := next((state for state in states if state != LOADED), None):
            if LOADED in states:  # of several workers some have read it
                await self._rpc("loradock_drop", number)
            raise AdapterRejected(f"the engine cannot load this adapter: {sentence(ValueError(reason))}")
        self._loras[adapter_id] = request

    async def touch(self, adapter_id: str) -> None:
        """Count an adapter as just used; vLLM loads it again if it let it go.

        vLLM's own `pin_lora` is not for this: it takes a slot of the batch away, which the scheduler does not know of.
        With as many other adapters in a batch as there are slots, the engine dies of a KeyError.
        """
        if request := self._loras.get(adapter_id):
            with rejecting():
                await self._call(self._engine().add_lora(request))

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """What each worker of each rank answers, between two steps."""
        if self.ranks == 1:
            answers: list[Any] = await self._call(self._engine().collective_rpc(method, args=args))
            return answers
        # vLLM's collective_rpc tells of the first rank alone.
        core = cast(Any, self._engine().engine_core)
        ranks = await self._call(core.call_utility_all_async("collective_rpc", method, None, args, None))
        return [answer for rank in ranks for answer in rank]

    async def remove(self, adapter_id: str) -> None:
        """Free an adapter's weights in the engine; nobody may be using it."""
        request = self._loras.pop(adapter_id, None)
        self._heads.pop(adapter_id, None)
        if self._tokenizers is not None:
            self._tokenizers.remove(adapter_id)
        if request is None or self._llm is None:
            return
        try:
            await self._call(self._llm.remove_lora(request.lora_int_id))
        except EngineDeadError as error:
            raise EngineUnavailable("the engine stopped while it freed an adapter") from error

    async def resident(self) -> set[int]:
        """Numbers of the adapters whose weights the engine holds, as it says itself."""
        return set(await self._call(self._engine().list_loras()))

    async def probe(self, adapter_id: str | None, prompts: Sequence[str]) -> list[dict[int, float]]:
        """The likeliest next tokens of each prompt, with their log-probabilities; nothing from a pooling model.

        Of an adapter that classifies, its labels' in their place.
        """
        if not self._generates:
            return []
        count = min(20, int(self._engine().model_config.max_logprobs))
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=count, detokenize=False)
        if head := self._heads.get(adapter_id or ""):
            params = parameters(head)
        answers = await asyncio.gather(*(self._ask(adapter_id, prompt, params) for prompt in prompts))
        return [
            {token: value.logprob for token, value in (answer.outputs[0].logprobs or [{}])[0].items()}
            for answer in answers
        ]

    async def score(self, adapter_id: str | None, text: str) -> float:
        """The mean log-probability of the tokens of a text."""
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        answer = await self._ask(adapter_id, text, params)
        ids = answer.prompt_token_ids or []
        logprobs = [
            values[token].logprob for token, values in zip(ids, answer.prompt_logprobs or [], strict=True) if values
        ]
        return sum(logprobs) / max(len(logprobs), 1)

    async def _classify(
        self, adapter_id: str, text: str | list[int], salt: str | None, priority: int
    ) -> tuple[list[float], int]:
        """The scores of a text, or of token ids, and how many tokens it is."""
        head = self._heads[adapter_id]
        prompt: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"prompt_token_ids": text}
        if salt:
            prompt["cache_salt"] = salt
        try:
            answer = await self._ask(adapter_id, prompt, parameters(head), priority)
        except ValueError as error:
            raise BadRequest(sentence(error), param="input") from error
        told = (answer.outputs[0].logprobs or [{}])[0]
        return scores(head, told), len(answer.prompt_token_ids or [])

    async def _ask(
        self, adapter_id: str | None, prompt: str | dict[str, Any], params: SamplingParams, priority: int | None = None
    ) -> RequestOutput:
        """A request of the server's own, behind those of clients unless it has a place among them."""
        lora = self._loras[adapter_id] if adapter_id else None
        name = f"{OWN}{next(self._probes)}"
        if priority is None:
            priority = engine_priority(LOW_PRIORITY) if self.prioritizes else 0
        asked_prompt: Any = {"prompt": prompt} if isinstance(prompt, str) else prompt
        asked = self._engine().generate(asked_prompt, params.clone(), name, lora_request=lora, priority=priority)
        try:
            answers = [answer async for answer in asked]
        except EngineDeadError as error:
            raise EngineUnavailable("the engine stopped while it measured an adapter; retry shortly") from error
        if not answers:
            raise EngineUnavailable("the engine did not answer while it measured an adapter; retry shortly")
        return answers[-1]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, of special ones too. From any thread: it has a tokenizer of its own."""
        if self._reader is None:
            tokenizer: Any = self._engine().get_tokenizer()
            self._reader = shared_copy(tokenizer) if hasattr(tokenizer, "_tokenizer") else tokenizer
        return str(self._reader.decode(list(tokens), skip_special_tokens=False))

    async def log_stats(self) -> None:
        await self._engine().do_log_stats()
        if hardware.on_cpu():
            try:
                self._cpu_steps.take(await self._rpc("loradock_steps"))
            except EngineDeadError as error:
                raise EngineUnavailable("the engine stopped while its steps were counted") from error

    def metrics(self, names: Collection[str] = ()) -> Iterable[Metric]:
        """vLLM's own series of this engine; of these `names` alone, if there are any."""
        return self._collectors.restricted_registry(names).collect() if names else self._collectors.collect()

    def busy_seconds(self) -> Mapping[str, float]:
        """How long its steps took, all ranks together: for clients, and for requests of the server's own."""
        times = self._pulse.step_times
        return {"clients": times.busy - times.background, "background": times.background}

    def _engine(self) -> Engine:
        if self._llm is None:
            raise EngineUnavailable("the engine is starting; retry shortly")
        if self._llm.errored:
            raise EngineUnavailable("the engine has stopped; it is being replaced")
        return self._llm


def prepare() -> None:
    """Change in vLLM what the server needs changed and its engines do not; nothing is done twice."""
    applying.install("server")


def _discard(llm: Engine) -> None:
    """Built for nobody any more."""
    building.kill(processes_of(llm))
    llm.shutdown()


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
