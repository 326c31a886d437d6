"""What we use of vLLM, by name: when the pin moves, this says first what moved with it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from starlette.datastructures import Headers
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.generate.base.serving import PRIORITY_HEADER, GenerateBaseServing
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import terminate_if_errored
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.factories import register_scale_out_api_routers
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.exception_handling.handlers import vllm_error
from vllm.exceptions import VLLMValidationError
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms.interface import Platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, DPLBAsyncMPClient
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import IterationStats, RequestSpecDecodeMetrics, RequestStateStats
from vllm.v1.outputs import LogprobsLists
from vllm.v1.worker import gpu_input_batch, gpu_model_runner
from vllm.v1.worker.gpu import model_runner as second_runner
from vllm.v1.worker.gpu import states as second_states
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.utils import request_memory

from serve.asgi.exchange import Parameters, Watch, watching
from serve.config import engine_options
from serve.errors import AdapterRejected, BadRequest, ConfigError, Conflict, EngineUnavailable
from serve.gateway.request import FOREIGN_MODEL_FIELDS, PRIORITY, RANK
from serve.gateway.tenant_isolation import tenant_salt
from serve.models import engine_memory, gpus, hardware
from serve.models.host import Host
from serve.vllm_backend.backend import VLLMBackend
from serve.vllm_backend.engine_arguments import parse
from serve.vllm_backend.output_processor import Outputs, Timed, ask_logprobs
from serve.vllm_backend.step_times import StepTimes
from serve.vllm_backend.vllm_metrics import Pulse, own_series
from serve.vllm_backend.worker_extension import LOADED, LOADING
from tests.support.nvml import Device, Nvml, cut


def test_the_engine_still_has_what_we_call():
    for name in ("from_engine_args", "shutdown", "add_lora", "remove_lora", "list_loras", "get_supported_tasks"):
        assert callable(getattr(AsyncLLM, name))
    assert "self.request_states: dict[str, RequestState]" in inspect.getsource(OutputProcessor.__init__)
    assert isinstance(AsyncLLM.errored, property)
    assert "self.output_handler: asyncio.Task" in inspect.getsource(AsyncLLM.__init__)
    assert list(inspect.signature(build_app).parameters) == ["args", "supported_tasks", "model_config"]
    assert list(inspect.signature(init_app_state).parameters) == ["engine_client", "state", "args", "supported_tasks"]
    assert "self.lora_requests" in inspect.getsource(OpenAIServingModels.__init__)
    taken = inspect.signature(AsyncLLM.generate).parameters
    assert list(taken)[1:4] == ["prompt", "sampling_params", "request_id"]
    assert {"lora_request", "priority"} <= set(taken)
    assert SamplingParams(temperature=0, max_tokens=1, logprobs=20, prompt_logprobs=0, detokenize=False).clone()
    assert {"lora_name", "lora_int_id", "lora_path", "base_model_name"} <= set(LoRARequest.__struct_fields__)


def test_tokens_in_and_out_are_still_asked_for_as_the_gateway_reads_them(tiny_model):
    assert parse(str(tiny_model), "base", {}).enable_scale_out is True
    assert 'getattr(args, "enable_scale_out", False)' in inspect.getsource(register_scale_out_api_routers)
    ours = {"model", "token_ids", "sampling_params", "cache_salt", "priority", "features", "content_parts"}
    assert ours | {"kv_transfer_params", "ec_transfer_params"} <= set(GenerateRequest.model_fields)
    # What is not read there would reach the engine unseen.
    known = ours | {"kv_transfer_params", "ec_transfer_params", "request_id", "stream", "stream_options", "output_mode"}
    known |= {"token_offsets", "reasoning_ended", "reasoning_parser_kwargs", "return_token_ids"}
    assert set(GenerateRequest.model_fields) == known
    assert {"n", "prompt_logprobs", "prompt_logprob_token_ids", "extra_args"} <= set(SamplingParams.__struct_fields__)


def test_the_runtime_lora_api_still_has_the_words_that_we_answer_with():
    source = inspect.getsource(OpenAIServingModels)
    for words in (
        "added successfully.",
        "removed successfully.",
        "conflicts with a",
        "cannot be found.",
        "must be provided.",
    ):
        assert words in source, words


def test_what_an_operator_is_told_of_an_engine_needs_no_engine(tiny_model):
    backend = VLLMBackend(str(tiny_model), "base", {"data_parallel_size": 2})
    assert (backend.seats, backend.ranks, backend.running, backend.waiting, backend.memory) == (0, 2, 0, 0, 0)
    assert not backend.dead


def test_data_parallel_ranks_are_still_reached_as_we_do():
    assert RANK in inspect.getsource(GenerateBaseServing._get_data_parallel_rank).lower().encode()
    assert list(inspect.signature(DPLBAsyncMPClient.call_utility_all_async).parameters) == ["self", "method", "args"]
    assert '"collective_rpc", method, timeout, args, kwargs' in inspect.getsource(AsyncMPClient.collective_rpc_async)


def test_the_places_where_answers_are_watched_are_still_there():
    """serve.vllm_backend.output_processor subclasses these and reads what they leave."""
    own = inspect.getsource(AsyncLLM.__init__)
    assert "self.output_processor = OutputProcessor(" in own
    add = inspect.getsource(AsyncLLM._add_request)
    assert add.index("self.output_processor.add_request(") < add.index("self.engine_core.add_request_async(")
    taken = list(inspect.signature(OutputProcessor.add_request).parameters)
    assert taken[:3] == ["self", "request", "prompt"]
    finished = list(inspect.signature(OutputProcessor._update_stats_from_finished).parameters)
    assert finished[:3] == ["self", "req_state", "finish_reason"]
    assert "req_state.logprobs_processor.update_from_output(engine_core_output)" in inspect.getsource(
        OutputProcessor.process_outputs
    )
    for name in ("detokenizer", "logprobs_processor", "prompt_token_ids", "stats", "num_cached_tokens"):
        assert f"self.{name} = " in inspect.getsource(RequestState.__init__)
    assert {"queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts", "first_token_latency", "arrival_time"} <= {
        field.name for field in dataclasses.fields(RequestStateStats)
    }
    assert LogprobsLists._fields[:2] == ("logprob_token_ids", "logprobs")


def test_the_longest_wait_is_remembered_and_hidden_log_probabilities_stay_hidden():
    timed = Timed(**vars(RequestStateStats(arrival_time=5.0)))
    for now in (1.0, 1.5, 3.5, 4.0):
        timed.last_token_ts = now
    assert (timed.worst, timed.last_token_ts, timed.arrival_time) == (2.0, 4.0, 5.0)

    params = SamplingParams(max_tokens=4)
    request = SimpleNamespace(sampling_params=params)
    state = SimpleNamespace(logprobs_processor=LogprobsProcessor(None, None, None, None, None, None))
    ask_logprobs(request, state)
    assert (params.logprobs, request.sampling_params.logprobs) == (None, 0), "others may share the params"
    rows = LogprobsLists(np.array([[7], [8]]), np.array([[-0.5], [-1.5]]), np.array([1, 1]))
    output = SimpleNamespace(new_logprobs=rows, new_prompt_logprobs_tensors=None, prompt_token_id_logprobs=None)
    state.logprobs_processor.update_from_output(output)
    assert state.logprobs_processor.kept == [-0.5, -1.5] and state.logprobs_processor.logprobs is None

    asked = SimpleNamespace(sampling_params=SamplingParams(logprobs=2))
    state = SimpleNamespace(logprobs_processor=None)
    ask_logprobs(asked, state)
    assert asked.sampling_params.logprobs == 2, "what a client asked for stays as it is"


def test_a_prompt_that_is_refused_never_comes_to_the_engine():
    seen = []

    def gate(prompt):
        seen.append(prompt)
        raise BadRequest("not this one")

    watch = Watch(gate=gate)
    with pytest.raises(VLLMValidationError, match="not this one"):
        processed(stream=False, watch=watch)
    assert seen == [[1, 2, 3]] and not watch.sequences


def processed(*, stream, logprobs=None, watch=None, n=4, step_times=None, drafts=None):
    """vLLM's own output processor over what an engine would send of one request; the answers that came of it."""
    processor = OutputProcessor(None, log_stats=True)
    processor.__class__ = Outputs
    processor.step_times = step_times
    processor.counts_drafts = drafts is not None
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    params = SamplingParams(max_tokens=n, output_kind=kind, detokenize=False, logprobs=logprobs)
    rest = dict.fromkeys(("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank"))
    request = EngineCoreRequest(
        "r-1", [1, 2, 3], sampling_params=params, arrival_time=time.time(), external_req_id="r", **rest
    )
    queue = RequestOutputCollector(kind, "r-1")
    token = watching.set(watch)
    try:
        processor.add_request(request, None, None, 0, queue)
    finally:
        watching.reset(token)
    answers = []
    for step, at in enumerate((10.2, 10.3, 10.7, 10.8)[:n]):
        events = None
        if step == 0:
            times = ((EngineCoreEventType.QUEUED, 10.0), (EngineCoreEventType.SCHEDULED, 10.1))
            events = [EngineCoreEvent(kind, when) for kind, when in times]
        rows = None
        if request.sampling_params.num_logprobs is not None:
            rows = LogprobsLists(np.array([[7 + step]]), np.array([[-0.5 * step]]), np.array([1]))
        output = EngineCoreOutput("r-1", [7 + step], new_logprobs=rows, events=events)
        if step == 3:
            output.finish_reason, output.spec_decode_metrics = FinishReason.LENGTH, drafts
        processor.process_outputs([output], at, IterationStats())
        if step_times is not None:
            step_times.ended()
        while (answer := queue.get_nowait()) is not None:
            answers.append(answer)
    return processor, answers


@pytest.mark.parametrize(("watch", "clients"), [(Watch(), 1), (Watch(background=True), 0), (None, 0)])
def test_what_the_server_asks_by_itself_is_counted_apart_from_what_clients_ask(watch, clients):
    processor, _ = processed(stream=True, watch=watch, n=2)  # it is under way
    backend = VLLMBackend.__new__(VLLMBackend)
    backend._llm = SimpleNamespace(output_processor=processor)
    assert (backend.running, backend.background) == (clients, 1 - clients)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
def test_a_request_is_seen_token_by_token_by_vllm_s_own_processor(stream, hidden):
    watch = Watch(logprobs=hidden)
    _, answers = processed(stream=stream, watch=watch)
    assert all(answer.outputs[0].logprobs is None for answer in answers) and len(answers) == (4 if stream else 1)
    (seen,) = [sequence.read() for sequence in watch.sequences]
    assert (list(seen.prompt), list(seen.output), seen.finish_reason) == ([1, 2, 3], [7, 8, 9, 10], "length")
    assert (seen.queue, seen.prefill, seen.gap, seen.worst_gap) == pytest.approx((0.1, 0.1, 0.2, 0.4))
    assert seen.cached == 0
    assert time.time() - 5 < seen.first <= time.time()
    assert seen.logprobs == ([0.0, -0.5, -1.0, -1.5] if hidden else None)


def test_drafts_are_counted_and_no_answer_tells_of_them():
    drafts, watch = RequestSpecDecodeMetrics.new(16), Watch()
    drafts.observe(8, 5)
    drafts.observe(3, 0)
    _, answers = processed(stream=False, watch=watch, drafts=drafts)
    assert [sequence.read().drafts for sequence in watch.sequences] == [(11, 5)]
    assert all(answer.outputs[0].spec_decode_metrics is None for answer in answers)


def test_a_request_is_charged_for_its_steps_and_says_what_it_asked_for():
    watch, times = Watch(tools=True), StepTimes()
    processed(stream=True, watch=watch, step_times=times)
    seen = watch.sequences[0].read()
    # From its turn at 10.1 to its last token at 10.8.
    assert (seen.engine_seconds, times.busy, times.background) == pytest.approx((0.7, 0.7, 0))
    assert (seen.parameters, seen.cached) == (Parameters(4, 1.0, tools=True), 0)
    processed(stream=True, step_times=(alone := StepTimes()))
    assert (alone.busy, alone.background) == pytest.approx((0.7, 0.7)), "nobody's"


def test_what_the_client_asked_for_is_looked_at_and_given():
    watch = Watch(logprobs=True)
    _, answers = processed(stream=True, logprobs=0, watch=watch)
    assert all(len(answer.outputs[0].logprobs) == 1 for answer in answers)
    assert watch.sequences[0].read().logprobs == [0.0, -0.5, -1.0, -1.5]


def test_a_client_that_left_is_an_abort_and_an_unwatched_request_is_nobodys():
    watch = Watch()
    processor, _ = processed(stream=True, watch=watch, n=2)
    processor.abort_requests(["r-1"], internal=True)
    seen = watch.sequences[0].read()
    assert (seen.finish_reason, list(seen.output)) == ("abort", [7, 8])
    _, answers = processed(stream=True)
    assert len(answers) == 4


def test_a_second_engine_needs_room_for_each_of_its_ranks(tiny_model, monkeypatch):
    gib = hardware.GIB
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setattr(engine_memory, "weights", lambda *_: 3 * gib)
    monkeypatch.setattr(engine_memory, "slots", lambda *_: gib)
    monkeypatch.setattr(Host, "free_memory", lambda self: 10 * gib)
    options = {"kv_cache_memory_bytes": gib}
    VLLMBackend(str(tiny_model), "base", options).check_room()
    with pytest.raises(Conflict, match="6.0 GiB of weights, 2.0 GiB of slots for adapters, 2.0 GiB of KV cache"):
        VLLMBackend(str(tiny_model), "base", {**options, "data_parallel_size": 2}).check_room()


def test_a_second_engine_leaves_the_first_the_part_of_its_cache_where_no_token_was_yet(tiny_model, monkeypatch):
    gib, taken = hardware.GIB, [0.0]
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setattr(engine_memory, "weights", lambda *_: 3 * gib)
    monkeypatch.setattr(engine_memory, "slots", lambda *_: gib)
    monkeypatch.setattr(Host, "free_memory", lambda self: 3 * gib + 3 * gib + gib // 2)
    monkeypatch.setattr("serve.vllm_backend.backend.private_bytes", lambda pid: int(taken[0] * gib))
    first = VLLMBackend(str(tiny_model), "base", {"kv_cache_memory_bytes": gib})
    second = first.another()
    second.check_room()  # the first does not run
    first._llm = SimpleNamespace()
    monkeypatch.setattr(first, "_pids", lambda: {7})
    for taken[0] in (0, 4, 4.4):
        with pytest.raises(Conflict, match=r"GiB for the engines before it"):
            second.check_room()
    for taken[0] in (4.6, 5, 7):
        second.check_room()


def test_a_second_engine_beside_the_first_is_refused_where_its_gpus_are_full(tiny_model, monkeypatch):
    free, full = Device("H100", 80, 79, "GPU-a"), Device("H100", 80, 5, "GPU-b")
    nvml = Nvml([free, full, free])
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    monkeypatch.setattr(gpus, "_library", lambda: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    VLLMBackend(str(tiny_model), "base", {}).check_room()
    for parallel in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        with pytest.raises(Conflict, match=r"only after it \(drain_first\): an engine takes 73.6 GiB of GPU 1"):
            VLLMBackend(str(tiny_model), "base", {parallel: 2}).check_room()
        VLLMBackend(str(tiny_model), "base", {parallel: 2, "gpu_memory_utilization": 0.05}).check_room()
    with pytest.raises(Conflict, match="of GPU 1 "):
        VLLMBackend(str(tiny_model), "base", {"device_ids": "1"}).check_room()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0,2")
    with pytest.raises(
        Conflict, match="of GPU 0 .*, and 5.0 GiB of its 80.0 GiB are free: lower gpu_memory_utilization"
    ):
        VLLMBackend(str(tiny_model), "base", {}).check_room()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    nvml.devices[0] = cut(Device("H100", 80, 79, "GPU-a"), 20)
    nvml.devices[0].slices[0].free = 10.0  # another engine has the rest of this slice
    with pytest.raises(Conflict, match=r"takes 18.4 GiB of GPU 0 .*, and 10.0 GiB of its 20.0 GiB"):
        VLLMBackend(str(tiny_model), "base", {}).check_room()
    nvml.broken = True  # of a driver that does not answer nothing is known
    VLLMBackend(str(tiny_model), "base", {}).check_room()


def test_a_driver_without_its_libraries_is_a_sentence(tiny_model, monkeypatch):
    """As vLLM says it where a container sees a GPU's file and has no library of its driver."""

    def parser(_):
        raise RuntimeError("Failed to infer device type")

    monkeypatch.setattr("serve.vllm_backend.engine_arguments.make_arg_parser", parser)
    with pytest.raises(ConfigError, match="finds no device here .Failed to infer device type.*nvidia-smi"):
        VLLMBackend(str(tiny_model), "base", {})


def test_what_a_check_of_gpus_rests_on():
    assert "init_snapshot.total_memory * cache_config.gpu_memory_utilization" in inspect.getsource(request_memory)
    assert callable(Platform.visible_device_id_to_physical_device_id)


async def test_the_workers_are_asked_ever_less_often_whether_they_have_read_an_adapter(tiny_model, monkeypatch):
    """Each time is a call of all of them, between two steps; ten times a second they have time for their part."""
    backend, now, asked = VLLMBackend(str(tiny_model), "base", {}), 0.0, []

    async def rpc(method, *_):
        if method == "loradock_finish":
            asked.append(now)
        return [LOADED if now > 6 else LOADING]

    async def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(backend, "_rpc", rpc)
    monkeypatch.setattr("serve.vllm_backend.backend.asyncio.sleep", sleep)
    monkeypatch.setattr("serve.vllm_backend.backend.time.monotonic", lambda: now)
    await backend.add("tone@1", 1, Path("/somewhere"))
    assert len(asked) < 90 and asked[-1] < 6.11
    assert asked[:4] == pytest.approx([0, 0.005, 0.010, 0.015])


async def test_what_one_worker_cannot_read_no_other_keeps(tiny_model, monkeypatch):
    backend, dropped = VLLMBackend(str(tiny_model), "base", {"tensor_parallel_size": 2}), []

    async def rpc(method, *args):
        if method == "loradock_drop":
            dropped.append(args)
        return [LOADED, "no such adapter"]

    monkeypatch.setattr(backend, "_rpc", rpc)
    with pytest.raises(AdapterRejected, match="no such adapter"):
        await backend.add("tone@1", 7, Path("/somewhere"))
    assert dropped == [(7,)]


def vllms_source(function):
    """Below what an earlier test may have put in its place in this process."""
    while original := getattr(function, "loradock_original", None):
        function = original
    return inspect.getsource(function)


def test_the_workers_still_have_what_we_call():
    assert list(inspect.signature(AsyncLLM.collective_rpc).parameters)[1:] == ["method", "timeout", "args", "kwargs"]
    assert list(inspect.signature(LRUCacheWorkerLoRAManager._load_adapter).parameters) == ["self", "lora_request"]
    for name in ("add_adapter", "remove_oldest_adapter", "_create_merged_loras_inplace", "__len__"):
        assert callable(getattr(LRUCacheLoRAModelManager, name))
    assert isinstance(LRUCacheLoRAModelManager.capacity, property)
    assert "self._is_moe = " in inspect.getsource(LRUCacheLoRAModelManager.__init__)
    assert "self.supports_mm: bool = " in inspect.getsource(LRUCacheLoRAModelManager._init_punica_wrapper)
    assert "self.lora_manager = " in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    assert "self.input_batch = " in inspect.getsource(gpu_model_runner.GPUModelRunner.__init__)
    assert "self.req_id_to_index" in inspect.getsource(gpu_input_batch.InputBatch.__init__)
    # The second kind of runner, which computes where Triton is: on GPUs.
    assert issubclass(second_runner.GPUModelRunner, LoRAModelRunnerMixin)
    assert "self.req_states = RequestState(" in inspect.getsource(second_runner.GPUModelRunner.__init__)
    assert "self.req_id_to_index" in inspect.getsource(second_states.RequestState.__init__)
    # An adapter that is registered takes its slot in the step that needs it.
    assert "self.add_adapter(lora)" in vllms_source(LRUCacheWorkerLoRAManager._apply_adapters)
    assert "self._adapter_manager.activate_adapter" in inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    # What DoRA scales, and when.
    assert "self._apply_lora_to_output(x, output)" in inspect.getsource(BaseLinearLayerWithLoRA._apply_sync)
    assert callable(BaseLinearLayerWithLoRA._get_quant_method)
    for name in ("activate_adapter", "get_adapter", "list_adapters"):
        assert callable(getattr(LRUCacheLoRAModelManager, name))
    assert "self._active_adapters" in vllms_source(LRUCacheLoRAModelManager.activate_adapter)
    assert "self.packed_modules: dict[str, list[str]] = {}" in inspect.getsource(LoRAModelManager.__init__)
    read = set(re.findall(r"lora_request\.(\w+)", inspect.getsource(LRUCacheWorkerLoRAManager._load_adapter)))
    assert read <= {"lora_path", "lora_int_id", "lora_name", "is_3d_lora_weight"}, (
        "the worker extension hands it only these"
    )


def test_the_engines_end_is_what_we_take_it_for():
    """What supervision and a second engine in one process rest on."""
    assert (
        list(inspect.signature(StatLoggerBase.record).parameters)[1:]
        == list(inspect.signature(Pulse.record).parameters)[1:]
    )
    assert "stat_loggers" in inspect.signature(AsyncLLM.from_engine_args).parameters
    assert "engine_dead" in inspect.getsource(AsyncLLM.errored.fget)
    assert callable(OutputProcessor.propagate_error)
    assert "engine_manager" in BackgroundResources.__dataclass_fields__
    assert "should_exit" in inspect.getsource(terminate_if_errored)
    assert "app.state.server" in inspect.getsource(vllm_error)


def test_each_engine_keeps_itsown_series():
    """vLLM takes what another engine registered out of the process's registry when it builds one."""
    first, second = CollectorRegistry(), CollectorRegistry()
    for own in (first, second):
        with own_series(own):
            unregister_vllm_metrics()
            Counter("vllm:of_a_test", "One.").inc()
    assert [len(list(own.collect())) for own in (first, second)] == [1, 1]
    assert not [one for one in REGISTRY.collect() if one.name == "vllm:of_a_test"]


async def test_a_call_that_a_stop_breaks_off_says_so():
    backend = VLLMBackend("some/model", "m", {})
    waiting = asyncio.create_task(backend._call(asyncio.Event().wait()))
    await asyncio.sleep(0)
    await backend.stop()
    with pytest.raises(EngineUnavailable):
        await waiting
    cancelled = asyncio.create_task(backend._call(asyncio.Event().wait()))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled


def test_an_engine_is_stalled_only_while_something_waits_for_it(monkeypatch):
    backend = VLLMBackend("some/model", "m", {})
    now = [100.0]
    monkeypatch.setattr("serve.vllm_backend.backend.time.monotonic", lambda: now[0])
    assert backend.stalled == 0 or backend._pulse.last
    now[0] = 200.0
    assert backend.stalled == 0, "nobody waits"
    backend._calls.add(None)
    now[0] = 210.0
    assert backend.stalled == 10
    backend._pulse.record(None, None)
    now[0] = 213.0
    assert backend.stalled == 3, "it took a step"


def test_a_salt_is_one_that_vllm_takes_and_never_the_key_of_an_adapter():
    adapter = LoRARequest(lora_name="acme/tone@0123456789ab", lora_int_id=1, lora_path="/blobs/0123")
    base = {"mm_features": [], "prompt_embeds": None}
    own = SimpleNamespace(**base, lora_request=adapter, cache_salt=None)
    with_adapter, _ = kv_cache_utils.generate_block_hash_extra_keys(own, 0, 16, 0)
    for tenant, salt in (("default", adapter.lora_name), ("a" * 64, "x" * 128), ("acme", None)):
        made = tenant_salt(salt, tenant)
        validate_cache_salt(made)
        asked = SimpleNamespace(**base, lora_request=None, cache_salt=made)
        keys, _ = kv_cache_utils.generate_block_hash_extra_keys(asked, 0, 16, 0)
        assert keys and not {adapter.lora_name, with_adapter} & {keys, made, *keys}


@pytest.mark.parametrize(
    ("options", "plain"),
    [({}, True), ({"enable_force_include_usage": True}, False), ({"reasoning_parser": "deepseek_r1"}, False)],
)
def test_a_server_that_adds_to_each_chunk_has_no_fast_streams(options, plain, monkeypatch):
    monkeypatch.setattr("serve.vllm_backend.patches.applying.is_on", lambda name: True)
    assert VLLMBackend("some/model", "m", options)._tells_plainly() is plain
    monkeypatch.setattr("serve.vllm_backend.patches.applying.is_on", lambda name: False)
    assert not VLLMBackend("some/model", "m", options)._tells_plainly(), "in safe mode vLLM's own way is taken"


def test_the_headers_that_are_ours_to_set_are_those_that_vllm_reads():
    assert PRIORITY.decode() == PRIORITY_HEADER.lower()
    raw = SimpleNamespace(headers=Headers(raw=[(PRIORITY, b"7"), (RANK, b"3")]))
    assert GenerateBaseServing._get_priority(SimpleNamespace(priority=0), raw) == 7
    assert GenerateBaseServing._get_data_parallel_rank(raw) == 3


@pytest.mark.parametrize(
    "request_model",
    [ChatCompletionRequest, BatchChatCompletionRequest, CompletionRequest, ResponsesRequest, AnthropicMessagesRequest],
)
def test_vllm_reads_none_of_the_fields_that_other_servers_choose_an_adapter_by(request_model):
    assert not set(FOREIGN_MODEL_FIELDS) & set(request_model.model_fields)


def test_the_options_read_as_text_are_the_ones_that_vllm_takes():
    taken = set(vars(parse("some/model", "m", {})))
    fields = {name for name in AsyncEngineArgs.__dataclass_fields__ if not name.startswith("_")}
    assert fields <= set(engine_options())
    unknown = {name for name in engine_options() if name not in taken}
    assert unknown <= fields, "an option that we offer and vLLM's command line does not take"


def test_options_arrive_as_vllm_types():
    given = {
        "max_loras": "3",
        "enforce_eager": "true",
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
    }
    given |= {
        "hf_overrides": {"a": 1},
        "max_model_len": "2k",
        "enable_auto_tool_choice": "1",
        "tool_call_parser": "hermes",
    }
    args = parse("some/model", "m", given)
    assert (args.max_loras, args.enforce_eager, args.enable_prefix_caching) == (3, True, False)
    assert (args.kv_cache_memory_bytes, args.hf_overrides, args.max_model_len) == (1 << 30, {"a": 1}, 2000)
    assert (args.enable_lora, args.served_model_name) == (True, ["m"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_loras": "many"}, "max-loras"),
        ({"enforce_eager": "perhaps"}, "true or false"),
        ({"max_lorass": 3}, "max_loras is"),
        ({"tool_call_parser": "none-such", "enable_auto_tool_choice": True}, "none-such"),
        ({"enable_auto_tool_choice": True}, "tool-call-parser"),
        ({"max_lora_rank": 7}, "max-lora-rank"),
    ],
)
def test_what_vllm_does_not_take_is_a_sentence(options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse("some/model", "m", options)
    assert "\n" not in str(caught.value)
