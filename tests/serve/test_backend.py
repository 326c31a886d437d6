"""What we use of vLLM, by name: when the pin moves, this says first what moved with it."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from serve.backend import parse
from serve.config import engine_options
from serve.errors import ConfigError
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


def test_the_workers_still_have_what_we_call():
    assert list(inspect.signature(AsyncLLM.collective_rpc).parameters)[1:] == ["method", "timeout", "args", "kwargs"]
    assert list(inspect.signature(LRUCacheWorkerLoRAManager._load_adapter).parameters) == ["self", "lora_request"]
    for name in ("add_adapter", "remove_oldest_adapter", "_create_merged_loras_inplace", "__len__"):
        assert callable(getattr(LRUCacheLoRAModelManager, name))
    assert isinstance(LRUCacheLoRAModelManager.capacity, property)
    assert "self._is_moe = " in inspect.getsource(LRUCacheLoRAModelManager.__init__)
    assert "self.lora_manager = " in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    # An adapter that is registered takes its slot in the step that needs it.
    assert "self.add_adapter(lora)" in inspect.getsource(LRUCacheWorkerLoRAManager._apply_adapters)
    assert "self._adapter_manager.activate_adapter" in inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    read = set(re.findall(r"lora_request\.(\w+)", inspect.getsource(LRUCacheWorkerLoRAManager._load_adapter)))
    assert read <= {"lora_path", "lora_int_id", "lora_name", "is_3d_lora_weight"}, "serve.worker hands it only these"


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
