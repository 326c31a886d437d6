"""The forward passes that the fused step computes, as they were read: the digest of each one's source.

A model is known by these, and not by the names of its classes: one whose forward pass changed would get wrong answers,
and goes layer by layer instead. What is the same in two families is the same here.
"""

from __future__ import annotations

_VLLM = "vllm.model_executor.models"
_HF = "transformers.models"
_LAYERS = "vllm.model_executor.layers"
_FUSED = f"{_VLLM}.transformers.fusers.rms_norm"

# By the place of what was read, in vLLM 0.32.0 and transformers 5.
FORWARDS = {
    f"{_VLLM}.llama:LlamaForCausalLM.forward": "ad39ab9546cd",
    f"{_VLLM}.llama:LlamaModel.forward": "4733e155842a",
    f"{_VLLM}.llama:LlamaDecoderLayer.forward": "c0fd45051b6d",
    f"{_VLLM}.llama:LlamaAttention.forward": "de2c8acb9130",
    f"{_VLLM}.llama:LlamaMLP.forward": "41f33f534faa",
    f"{_VLLM}.mistral:MistralModel.forward": "02b403f4337f",
    f"{_VLLM}.mistral:MistralDecoderLayer.forward": "640c5626f4d6",
    f"{_VLLM}.mistral:MistralAttention.forward": "ceaf1370b13e",
    f"{_VLLM}.mistral:MistralMLP.forward": "9bd74688cccc",
    f"{_VLLM}.qwen2:Qwen2ForCausalLM.forward": "8ecb50e3d626",
    f"{_VLLM}.qwen2:Qwen2Model.forward": "5fd0d54b7204",
    f"{_VLLM}.qwen2:Qwen2DecoderLayer.forward": "c0fd45051b6d",
    f"{_VLLM}.qwen2:Qwen2Attention.forward": "da4f59e61271",
    f"{_VLLM}.qwen2:Qwen2MLP.forward": "d7f89b4dc80a",
    f"{_VLLM}.qwen3:Qwen3ForCausalLM.forward": "8ecb50e3d626",
    f"{_VLLM}.qwen3:Qwen3DecoderLayer.forward": "c0fd45051b6d",
    f"{_VLLM}.qwen3:Qwen3Attention.forward": "71252fa9f4d3",
    f"{_VLLM}.gemma2:Gemma2ForCausalLM.forward": "8ecb50e3d626",
    f"{_VLLM}.gemma2:Gemma2Model.forward": "c4e4110ba45c",
    f"{_VLLM}.gemma2:Gemma2DecoderLayer.forward": "637abc88ab8d",
    f"{_VLLM}.gemma2:Gemma2Attention.forward": "de2c8acb9130",
    f"{_VLLM}.gemma2:Gemma2MLP.forward": "d7f89b4dc80a",
    f"{_VLLM}.gemma3:Gemma3ForCausalLM.forward": "7e182e88d6ad",
    f"{_VLLM}.gemma3:Gemma3Model.forward": "74c7fb900089",
    f"{_VLLM}.gemma3:Gemma3DecoderLayer.forward": "cd4438f751b2",
    f"{_VLLM}.gemma3:Gemma3Attention.forward": "6cdc342a1035",
    f"{_VLLM}.gemma3:Gemma3MLP.forward": "d7f89b4dc80a",
    f"{_VLLM}.granite:GraniteForCausalLM.forward": "ad39ab9546cd",
    f"{_VLLM}.granite:GraniteModel.forward": "96daabf4a20b",
    f"{_VLLM}.granite:GraniteDecoderLayer.forward": "7055a7d942aa",
    f"{_VLLM}.granite:GraniteAttention.forward": "f3835c928c90",
    f"{_VLLM}.granite:GraniteMLP.forward": "d7f89b4dc80a",
    f"{_VLLM}.commandr:CohereForCausalLM.forward": "4466fbc2080b",
    f"{_VLLM}.commandr:CohereModel.forward": "c4e4110ba45c",
    f"{_VLLM}.commandr:CohereDecoderLayer.forward": "109772af8b8d",
    f"{_VLLM}.commandr:CohereAttention.forward": "2f6ff4c66d60",
    f"{_VLLM}.commandr:CohereMLP.forward": "d7f89b4dc80a",
    f"{_VLLM}.transformers.base:Base.forward": "bc60fab0e90b",
    f"{_HF}.smollm3.modeling_smollm3:SmolLM3Model.forward": "8f1864cf9a51",
    f"{_HF}.smollm3.modeling_smollm3:SmolLM3DecoderLayer.forward": "0c96a21fcbb1",
    f"{_HF}.smollm3.modeling_smollm3:SmolLM3Attention.forward": "e4dffb04eee4",
    f"{_HF}.smollm3.modeling_smollm3:SmolLM3MLP.forward": "bfdebef9e614",
    f"{_HF}.olmo2.modeling_olmo2:Olmo2Model.forward": "704c2bc0525b",
    f"{_HF}.olmo2.modeling_olmo2:Olmo2DecoderLayer.forward": "e89f6f38d449",
    f"{_HF}.olmo2.modeling_olmo2:Olmo2Attention.forward": "5337dcf94fd1",
    f"{_HF}.olmo2.modeling_olmo2:Olmo2MLP.forward": "bfdebef9e614",
}
# It multiplies embeddings by a setting of its own.
GRANITE = FORWARDS[f"{_VLLM}.granite:GraniteModel.forward"]

# What the norms and activations compute, by the method that says it in plain operations.
PLAIN = {
    f"{_LAYERS}.layernorm:RMSNorm.forward_native": "7e23d5815d7a",
    f"{_LAYERS}.layernorm:GemmaRMSNorm.forward_native": "ea62e65b8b2c",
    f"{_FUSED}:TPAwareRMSNorm.forward": "1257988adbf8",
    f"{_FUSED}:TPAwareGemmaRMSNorm.forward": "1257988adbf8",
    f"{_VLLM}.commandr:RMSNorm.forward": "e31d20266ce8",
    f"{_VLLM}.commandr:LayerNorm.forward": "e4ee7c3a23ea",
    f"{_LAYERS}.activation:SiluAndMul.forward_native": "d1a882cf4f80",
    f"{_LAYERS}.activation:GeluAndMul.forward_native": "5268011cc7e4",
}
KNOWN = frozenset(FORWARDS.values()) | frozenset(PLAIN.values())
