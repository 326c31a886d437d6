"""What families of decoder models differ in, as a table: the steps ask it, and nothing here needs torch.

A family says which modules of a layer read what one module makes, so that scales may be moved between them, how its
norms multiply, and what else a step has to know. Rope and mask of each layer, scaling and soft caps of the logits are
not here: the steps take them from the model's own forward.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optimize.errors import Refused


@dataclass(frozen=True, slots=True)
class Feed:
    """`consumers` are all that reads what `producer` makes: a norm's output, or up_proj's up to a product with gate's.

    With `half` the producer is gate and up in one, and up's rows are its second half.
    """

    producer: str
    consumers: tuple[str, ...]
    half: bool = False


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = Feed("mlp.up_proj", ("mlp.down_proj",))
LLAMA = (Feed("input_layernorm", QKV), Feed("post_attention_layernorm", GATE_UP), DOWN)
GEMMA = (Feed("input_layernorm", QKV), Feed("pre_feedforward_layernorm", GATE_UP), DOWN)
PARALLEL = (Feed("input_layernorm", QKV + GATE_UP), DOWN)
ONE_UP = (Feed("input_layernorm", QKV), Feed("post_attention_layernorm", ("mlp.up_proj",)))
FUSED = (
    Feed("input_layernorm", ("self_attn.qkv_proj",)),
    Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Feed("mlp.gate_up_proj", ("mlp.down_proj",), half=True),
)
FUSED_MLP = (Feed("input_layernorm", QKV), *FUSED[1:])


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one structure.

    offset      norms multiply with 1 + weight
    normed      what a block makes passes a norm before it is added to the stream
    experts     the MLP is a mixture of experts
    tied_only   vLLM takes the embedding for the output layer, whatever the checkpoint says
    adaptable   vLLM takes adapters on it
    unadapted   modules on which vLLM takes none
    unread      keys of config.json that vLLM leaves out where they are set
    """

    name: str
    model_type: str
    feeds: tuple[Feed, ...] = LLAMA
    offset: bool = False
    normed: bool = False
    experts: bool = False
    tied_only: bool = False
    adaptable: bool = True
    unadapted: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


FAMILIES = (
    Family("Llama", "llama"),  # rope of Llama 3.x, biases where the config has them
    Family("Qwen2.5", "qwen2"),  # biases of q, k and v; windows from a layer on
    Family("Qwen3", "qwen3"),  # norms of q and k
    Family("Qwen3-MoE", "qwen3_moe", LLAMA[:1], experts=True),
    Family("Mistral", "mistral"),  # a window
    Family("Mixtral", "mixtral", LLAMA[:1], experts=True),  # a window
    # Norms before and after each block, every other layer with a window, two soft caps.
    Family("Gemma 2", "gemma2", GEMMA, offset=True, normed=True, tied_only=True),
    # Norms before and after each block, local layers with a window and a rope of their own.
    Family("Gemma 3", "gemma3_text", GEMMA, offset=True, normed=True),
    Family("Phi-3, Phi-4", "phi3", FUSED),  # q, k and v in one matrix, gate and up in another
    Family("Granite", "granite"),  # multipliers of embedding, residual, attention and logits
    Family("OLMo 2", "olmo2", (DOWN,), normed=True),  # norms after each block alone
    Family("SmolLM3", "smollm3"),  # layers without rope
    # Attention and MLP side by side behind one LayerNorm, layers without rope, a logit scale.
    Family("Cohere 2", "cohere2", PARALLEL, tied_only=True),
    # LayerNorm with bias, side by side where the config says so.
    Family("StableLM", "stablelm", adaptable=False, unread=("use_parallel_residual", "qk_layernorm")),
    Family("Gemma", "gemma", offset=True),
    # As Cohere 2, without windows, norms of q and k where the config says so.
    Family("Cohere", "cohere", PARALLEL, tied_only=True),
    Family("Seed-OSS", "seed_oss"),  # biases of q, k and v
    Family("Arcee", "arcee", ONE_UP),  # an MLP without a gate: the square of a ReLU
    # As OLMo 2, with windows in three layers of four.
    Family("OLMo 3", "olmo3", (DOWN,), normed=True),
    Family("Ministral", "ministral"),  # windows
    Family("Ministral 3", "ministral3"),  # queries that are scaled by their position
    Family("ERNIE 4.5", "ernie4_5", unread=("use_bias",)),  # rope of pairs side by side
    Family("Hunyuan", "hunyuan_v1_dense"),  # norms of q and k behind the rope
    # Norms before and after each block, half of a head with rope.
    Family("GLM-4", "glm4", FUSED_MLP, normed=True, unadapted=("gate_up_proj",)),
    Family("GLM", "glm", FUSED_MLP),  # half of a head with rope
    # Norms after each block alone, windows, full layers without rope.
    Family("EXAONE 4", "exaone4", (DOWN,), normed=True),
    Family("OLMo", "olmo", (DOWN,)),  # norms without weights
    # LayerNorms of 1 + weight, and an MLP without a gate.
    Family("Nemotron", "nemotron", ONE_UP, offset=True),
    Family("Helium", "helium"),
)
BY_TYPE = {family.model_type: family for family in FAMILIES}
TAKEN = "the documentation's page of model families has those that it takes"

# Lists in config.json with an entry for each layer, and lists of layers' numbers.
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
NUMBERS = ("mlp_only_layers",)


def known(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, if it is in the table."""
    return BY_TYPE.get(str(config.get("model_type")))


def of(config: Mapping[str, Any], what: str) -> Family:
    """The family; Refused when `what`, a step, does not know the model's structure."""
    family = known(config)
    if family is None:
        raise Refused(f"{what} does not know models of type {config.get('model_type')!r}: {TAKEN}")
    return family


# The tensors of a decoder that is laid out as Llama: no other table of tokens, no other mixer, no experts.
_AS_LLAMA = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head|model\.layers\.\d+\.("
    r"self_attn\.([qkvo]_proj|qkv_proj|[a-z_]*norm|rotary_emb)|mlp\.(gate|up|down|gate_up)_proj|[a-z_]*norm"
    r"))\.(weight|bias|inv_freq)"
)


def readable(config: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Refused when `what`, a step, knows neither the family nor the layout by the `names` of the model's tensors."""
    if known(config) is None and (strange := next((name for name in names if not _AS_LLAMA.fullmatch(name)), None)):
        raise Refused(
            f"{what} does not know models of type {config.get('model_type')!r}, which have {strange}: {TAKEN}, and "
            "others whose tensors are those of Llama are taken too"
        )


def dense(config: Mapping[str, Any], what: str) -> Family:
    """The family; Refused for a mixture of experts too."""
    family = of(config, what)
    if family.experts:
        raise Refused(
            f"{what} does not take the experts of {family.name}: merge, combine, `prune: layers` and "
            "`prune: vocabulary` do"
        )
    return family


def feeds(config: Mapping[str, Any]) -> tuple[Feed, ...]:
    """What reads what in each layer of this model; nothing for a family that is not known."""
    family = known(config)
    if family is None:
        return ()
    return PARALLEL if config.get("use_parallel_residual") else family.feeds


def as_vllm_reads(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what vLLM reads by a name of its own: how Ministral 3 scales queries by their position."""
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") != "ministral3" or not (beta := rope.get("llama_4_scaling_beta")):
        return dict(config)
    longest = "original_max_position_embeddings"
    return {**config, "llama_4_scaling": {"beta": beta, longest: rope[longest]}}


def refuse_multimodal(config: Mapping[str, Any]) -> None:
    """Refused for a model that does not only read text."""
    if "text_config" in config or "vision_config" in config:
        kind = (config.get("architectures") or [config.get("model_type")])[0]
        raise Refused(
            f"the model is multimodal ({kind}), and text models are optimized: save its language model by itself "
            "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)) and name that"
        )


def without(config: Mapping[str, Any], whole: Mapping[str, Any], dropped: Collection[int]) -> dict[str, Any]:
    """config.json without the layers `dropped`; `whole` is the same with the values that it leaves to its class."""
    count = int(config["num_hidden_layers"])
    kept = [at for at in range(count) if at not in dropped]
    made = {**config, "num_hidden_layers": len(kept)}
    for key in PER_LAYER:
        values = whole.get(key)
        if isinstance(values, list) and len(values) == count:
            made[key] = [values[at] for at in kept]
    for key in NUMBERS:
        if config.get(key):
            made[key] = [kept.index(at) for at in config[key] if at in kept]
    if config.get("max_window_layers") is not None:
        made["max_window_layers"] = sum(at < int(config["max_window_layers"]) for at in kept)
    return made
