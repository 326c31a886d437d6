"""The base model as an adapter sees it: which modules it has, and how large they are.

The shapes come from the configuration alone, through an empty model on torch's meta device: no weights are read, and a
quantized checkpoint has the same modules as the one that it was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serve import __version__
from serve.errors import ConfigError
from serve.files import write_whole

# Whose embedding and output layer vLLM 0.32 puts a LoRA on, by architecture (`embedding_modules` of its model classes,
# inherited ones included). Elsewhere only linear layers take one: it refuses Mistral's or Qwen2's embedding at load.
_BOTH = ("embed_tokens", "lm_head")
EMBEDDINGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "ApertusForCausalLM",
            "DeciLMForCausalLM",
            "Ernie4_5ForCausalLM",
            "Exaone4ForCausalLM",
            "ExaoneMoeForCausalLM",
            "FalconH1ForCausalLM",
            "GraniteForCausalLM",
            "GraniteMoeForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "HyperCLOVAXForCausalLM",
            "InternLM3ForCausalLM",
            "JambaForCausalLM",
            "LLaMAForCausalLM",
            "Lfm2ForCausalLM",
            "Lfm2MoeForCausalLM",
            "Llama4ForCausalLM",
            "LlamaForCausalLM",
            "MiniCPM3ForCausalLM",
            "MiniCPMForCausalLM",
            "MixtralForCausalLM",
            "NemotronForCausalLM",
            "NemotronHForCausalLM",
            "Phi3ForCausalLM",
            "PhiMoEForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "SolarForCausalLM",
            "TeleChat2ForCausalLM",
        ),
        _BOTH,
    ),
    "CohereForCausalLM": ("embed_tokens",),
    "Cohere2ForCausalLM": ("embed_tokens",),
    "ExaoneForCausalLM": ("wte", "lm_head"),
}


def kept_lora_modules(model: str, cache: Path) -> Mapping[str, tuple[int, int]]:
    """As `lora_modules`, from the cache folder where it is there: an empty model takes seconds of imports."""
    try:
        told = [(Path(model) / "config.json").read_text(), __version__, version("transformers")]
    except OSError:  # no folder: a hub's
        return lora_modules(model)
    file = cache / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return {str(name): (int(out), int(into)) for name, (out, into) in json.loads(file.read_text()).items()}
    made = lora_modules(model)
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(made).encode())
    return made


def module_shapes(model: str, *, trust_remote_code: bool = False) -> dict[str, tuple[int, int]]:
    """The base's linear, embedding and output modules by Hugging Face name -> (out_features, in_features).

    An embedding counts as (embedding_dim, vocabulary), which is how its LoRA multiplies.
    """
    _, skeleton = _skeleton(model, trust_remote_code)
    return _shapes(skeleton)


def lora_modules(
    model: str, *, trust_remote_code: bool = False, embeddings: Collection[str] | None = None
) -> dict[str, tuple[int, int]]:
    """Those of `module_shapes` that vLLM can put a LoRA on.

    `embeddings` names the embedding and output modules that take one; by default the architecture says.
    """
    config, skeleton = _skeleton(model, trust_remote_code)
    if embeddings is None:
        architecture = (getattr(config, "architectures", None) or [type(skeleton).__name__])[0]
        embeddings = EMBEDDINGS.get(architecture, ())
    return only_lora(_shapes(skeleton), _tables(skeleton), embeddings)


def only_lora(
    shapes: Mapping[str, tuple[int, int]], tables: Collection[str], embeddings: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Leave out the `tables` (embeddings, output layer) whose last name is not among `embeddings`."""
    return {
        name: shape for name, shape in shapes.items() if name not in tables or name.rpartition(".")[2] in embeddings
    }


def _shapes(skeleton: Any) -> dict[str, tuple[int, int]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    shapes: dict[str, tuple[int, int]] = {}
    for name, module in skeleton.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = (module.embedding_dim, module.num_embeddings)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes


def _tables(skeleton: Any) -> set[str]:
    import torch

    output = skeleton.get_output_embeddings()
    return {
        name
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if isinstance(module, torch.nn.Embedding) or (output is not None and module is output)
    }


def _skeleton(model: str, trust_remote_code: bool) -> tuple[Any, Any]:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as unknown:
        raise ConfigError(
            f"{model} is not a model that can be read ({_first_line(unknown)}); give a folder with a config.json, "
            "or a hub id"
        ) from unknown
    # A quantized checkpoint's modules are called as before; building them quantized would need its kernels.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = (getattr(config, "architectures", None) or [""])[0]
    known = getattr(transformers, architecture, None) if architecture else None
    try:
        with torch.device("meta"):
            if known is not None and not trust_remote_code:
                return config, known._from_config(config)
            build = transformers.AutoModelForCausalLM.from_config
            return config, build(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, AttributeError, KeyError, TypeError, RuntimeError) as unbuildable:
        raise ConfigError(
            f"the modules of {model} cannot be listed ({_first_line(unbuildable)}); is its architecture known to this "
            "version of transformers?"
        ) from unbuildable


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
