"""A Llama of three small layers and its tokenizer, whose vocabulary is a few dozen words."""

from __future__ import annotations

from typing import Any

TEXT = (
    "the river ran past a small town where people baked bread and sold it on the market every morning until noon "
    "children looked for boats among reeds while their teacher read a letter in a hand that nobody could understand "
    "old ships carried salt and wool over cold water to harbours far in north and came home with fish and stories"
)
WORDS = TEXT.split()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["<end>", "<unk>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>", pad_token="<end>")


def model(words: Any) -> Any:
    """Random weights, the same each time, for a tokenizer's words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256, eos_token_id=0, bos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
