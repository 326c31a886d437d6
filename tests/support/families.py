"""A tiny random model of each family: three layers, norms and biases that are not their defaults, windows that bite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = 254  # besides <end>, <unk> and <s>: the vocabulary trims to fewer
WINDOW = 8
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ROPE_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 8,
    "max_position_embeddings": 256, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "head_dim": 16, "num_key_value_heads": 2,
}  # fmt: skip
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

# name -> (model_type, what its config has beside SIZE)
CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"rope_parameters": ROPE_3, "attention_bias": True, "mlp_bias": True}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen2.5, windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "norm_topk_prob": True}),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma 2": (
        "gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0,
         "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "Gemma 3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 32,
         "tie_word_embeddings": True},
    ),
    "Phi-3, Phi-4": ("phi3", {}),
    "Granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2,
         "attention_bias": True, "mlp_bias": True},
    ),
    "OLMo 2": ("olmo2", {}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "Cohere 2": (
        "cohere2", {"sliding_window": WINDOW, "layer_types": ALTERNATING, "logit_scale": 0.25,
                    "tie_word_embeddings": True},
    ),
    "StableLM": ("stablelm", {"use_qkv_bias": True}),
    "StableLM, side by side": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "Gemma": ("gemma", {"tie_word_embeddings": True}),
    "Cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True}),
    "Seed-OSS": ("seed_oss", {}),
    "Arcee": ("arcee", {"attention_bias": True, "mlp_bias": True}),
    "OLMo 3": ("olmo3", {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "Ministral": ("ministral", {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "Ministral 3": ("ministral3", {"rope_parameters": ROPE_YARN}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Hunyuan": ("hunyuan_v1_dense", {}),
    "GLM-4": ("glm4", {}),
    "GLM": ("glm", {}),
    "EXAONE 4": ("exaone4", {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "OLMo": ("olmo", {"clip_qkv": 2.0}),
    "Nemotron": ("nemotron", {}),
    "Helium": ("helium", {}),
    "Qwen2-MoE": (
        "qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4.5": ("glm4_moe", {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "DeepSeek V2": ("deepseek_v2", {**LATENT, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "DeepSeek V3": (
        "deepseek_v3",
        {**LATENT, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "GPT-OSS": (
        "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "Qwen3-Next": (
        "qwen3_next",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 2,
         "linear_num_key_heads": 1, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "Falcon-H1": ("falcon_h1", {**STATES, "mamba_d_ssm": 64}),
    "Mamba 2": ("mamba2", {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "OPT": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "Gemma 3n": (
        "gemma3n_text",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "vocab_size_per_layer_input": WORDS + 3,
         "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2,
         "activation_sparsity_pattern": [0.0] * 3, "intermediate_size": [128] * 3},
    ),
    "Gemma 4": (
        "gemma4_text",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "vocab_size_per_layer_input": WORDS + 3,
         "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "global_head_dim": 32},
    ),
}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_b_proj"}
OUTSIDE = {"lm_head", "embed_out", "out_proj", "router", "gate"}  # PEFT has no adapter for Mamba's own out_proj
SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip


def tokenizer() -> Any:
    """Words, with a BOS token before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unk>", "<s>", "a", *(f"w{at}" for at in range(1, WORDS))]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )


def written(name: str, folder: Path, dtype: str = "float32", **more: Any) -> Path:
    """The family's model in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer()
    kind, own = CONFIGS[name]
    config = AutoConfig.for_model(kind, **{**SIZE, "vocab_size": len(words), **own, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in parameter_name and parameter_name.endswith("weight"):
            parameter.data = 0.3 * noise + (0.0 if kind.startswith(("gemma", "nemotron")) else 1.0)
        elif parameter.dim() == 1:
            parameter.data = 0.2 * noise
        else:
            parameter.data = noise * (1.0 if "embed" in parameter_name else 1.2 * parameter.shape[-1] ** -0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sentences(seed: int, count: int, words: int = 64) -> list[str]:
    """Lines of words, the first of the vocabulary more often than the last, so that not all of it is used."""
    import random

    dice = random.Random(seed)
    return [" ".join(f"w{1 + int(100 * dice.random() ** 2)}" for _ in range(words)) for _ in range(count)]


def adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter on all linear layers, none of whose tensors is zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    leaves = {leaf for name in names if not (leaf := name.rpartition(".")[2]).isdigit()} - OUTSIDE
    if any("experts" in name for name, _ in model.named_parameters()):
        leaves = {leaf for leaf in leaves if leaf in ATTENTION} or leaves
    targets = sorted(leaves or {"c_attn"})
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder
