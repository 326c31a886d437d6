"""What the server and vLLM's engine and worker import on a CPU; imported once, before one is forked from the other."""

# ruff: noqa: E402, F401
import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A third of the time that the imports take would go into looking for garbage in what stays.
collects = gc.isenabled()
gc.disable()

from serve.vllm_backend import deferred_compiler, package_scans

package_scans.install()
deferred_compiler.install()

import transformers.models.auto
import vllm.entrypoints.openai.models.protocol
import vllm.lora.model_manager
import vllm.lora.worker_manager
import vllm.model_executor.layers.quantization.online.base
import vllm.model_executor.model_loader
import vllm.model_executor.models.llama
import vllm.model_executor.models.registry
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker

from serve.cpu_kernels import pages

pages.release()
if collects:
    gc.enable()

# An engine's options by which it has another tokenizer than its model's folder holds, or none.
_OTHER_TOKENIZER = (
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "revision",
    "runner",
    "skip_tokenizer_init",
    "trust_remote_code",
)


def register_kernels() -> None:
    """vLLM's substitutes for its Triton kernels; modules that are imported later get them by the kernels' names."""
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()


def tokenizer(model: str, options: Mapping[str, Any]) -> None:
    """Read a model's tokenizer, which the server and the engine will ask vLLM for: it is in memory once then."""
    if not Path(model, "tokenizer.json").is_file() or any(name in options for name in _OTHER_TOKENIZER):
        return
    from vllm.tokenizers import cached_get_tokenizer

    try:  # as vLLM's cached_tokenizer_from_config calls it, which is where it is found again
        read = cached_get_tokenizer(
            model, runner_type="generate", tokenizer_mode="auto", revision=None, trust_remote_code=False
        )
        if not _has_processor(Path(model)):
            _keep_from_reading_it_again(read)
            _forget_what_made_it(read)
    except Exception as error:  # whoever needs it says what is wrong
        logging.getLogger("loradock").debug("the tokenizer of %s is not read beforehand: %s", model, error)


def _keep_from_reading_it_again(tokenizer: Any) -> None:
    """vLLM looks for a processor's chat template first, and holds what it finds: of a model of text the same tokenizer
    once more, 100 MB for 150,000 tokens. Here it finds that there is none, as it would find by itself."""
    from vllm.renderers import hf

    hf._PROCESSOR_CHAT_TEMPLATES.setdefault((tokenizer.name_or_path, None, None, False), None)


def _forget_what_made_it(tokenizer: Any) -> None:
    """transformers' classes hold what their library's tokenizer was made of, 60 MB for 150,000 tokens: of those that
    are no part of a processor nothing reads it again."""
    if hasattr(tokenizer, "_tokenizer"):
        for name in ("_vocab", "_merges"):
            if isinstance(held := getattr(tokenizer, name, None), dict | list):
                held.clear()


def _has_processor(model: Path) -> bool:
    """Whether a checkpoint may have more than a tokenizer."""
    if any(model.glob("*processor_config.json")):
        return True
    texts = (model / name for name in ("config.json", "tokenizer_config.json"))
    told = [json.loads(text.read_bytes()) for text in texts if text.is_file()]
    return any(
        name in each for each in told for name in ("processor_class", "auto_map", "vision_config", "audio_config")
    )
