"""One of vLLM's models with its LoRA layers in this process: no engine, no cache, steps only as the layers see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from serve.vllm_backend.adapter_names import Names
from serve.vllm_backend.dora import Magnitudes
from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named
from serve.vllm_backend.saved_modules import SavedModules
from serve.vllm_backend.worker_extension import LOADED, LOADING, Loader


@contextmanager
def one_worker(folder: Path, *patches: str) -> Iterator[None]:
    """vLLM's state of a process that is the only worker: its layers want to know their place among parallel ones."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    for name in ("lora-rows", "lora-device", *patches):
        apply(named(name))
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder / 'init'}", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


class LayersOnly:
    """A model of the folder in vLLM's layers, on a CPU, with slots for a few adapters."""

    def __init__(
        self, folder: Path, dtype: str = "float32", *, slots: int = 4, rank: int = 8, runner: Any = "auto"
    ) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
        from vllm.model_executor.model_loader import get_model

        self.config = EngineArgs(
            model=str(folder), runner=runner, skip_tokenizer_init=True, dtype=dtype, max_model_len=64,
            enforce_eager=True, enable_lora=True, max_lora_rank=rank, max_loras=slots, max_cpu_loras=2 * slots,
            max_num_seqs=32,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(self.config):
            self.model = get_model(vllm_config=self.config)
            tables = getattr(self.model, "embedding_modules", {})
            manager = LRUCacheWorkerLoRAManager(self.config, torch.device("cpu"), tables)
            manager.create_lora_manager(self.model, self.config)
        self.adapters = manager._adapter_manager
        pools = self.config.model_config.runner_type == "pooling"
        self.runner = SimpleNamespace(vllm_config=self.config, is_pooling_model=pools)
        names, magnitudes = Names(manager, self.runner), Magnitudes(manager, self.runner)
        self.saved = SavedModules(manager, self.runner)
        self.loader = Loader(manager, computed=[names, magnitudes, self.saved])

    def load(self, adapter: Path, number: int) -> str:
        request = SimpleNamespace(
            lora_name=str(number), lora_int_id=number, lora_path=str(adapter), is_3d_lora_weight=False
        )
        self.loader.begin(request)
        while (state := self.loader.finish(number)) == LOADING:
            pass
        if state == LOADED:
            self.adapters.activate_adapter(number)
        return state

    def step(self, adapters: Sequence[int], requests: Sequence[int] | None = None) -> None:
        """The rows of the step that comes, and its requests, by their adapters' numbers; 0 for none."""
        from vllm.lora.layers import LoRAMapping

        self.adapters.set_adapter_mapping(LoRAMapping(tuple(adapters), tuple(requests or adapters), is_prefill=True))

    def embedded(self, tokens: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.model.model.embed_tokens(tokens)

    def logits(self, hidden: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.model.compute_logits(hidden)
