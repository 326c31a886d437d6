"""What we use of vLLM, by name: when the pin moves, this says first what moved with it."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import terminate_if_errored
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling.handlers import vllm_error
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import BackgroundResources
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from serve.backend import Pulse, VLLMBackend, _own_series, parse
from serve.config import engine_options
from serve.errors import ConfigError, EngineUnavailable
from serve.inference import salted


def test_the_engine_still_has_what_we_call():
    for name in ("from_engine_args", "shutdown", "add_lora", "remove_lora", "list_loras", "get_supported_tasks"):
        assert callable(getattr(AsyncLLM, name))
    assert callable(AsyncLLM.get_num_unfinished_requests)
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


def test_each_engine_keeps_its_own_series():
    """vLLM takes what another engine registered out of the process's registry when it builds one."""
    first, second = CollectorRegistry(), CollectorRegistry()
    for own in (first, second):
        with _own_series(own):
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
    monkeypatch.setattr("serve.backend.time.monotonic", lambda: now[0])
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
        made = salted(salt, tenant)
        validate_cache_salt(made)
        asked = SimpleNamespace(**base, lora_request=None, cache_salt=made)
        keys, _ = kv_cache_utils.generate_block_hash_extra_keys(asked, 0, 16, 0)
        assert keys and not {adapter.lora_name, with_adapter} & {keys, made, *keys}


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
