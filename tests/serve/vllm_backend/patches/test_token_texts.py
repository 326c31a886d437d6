"""Each token of log-probabilities is decoded once, and reads as vLLM has it."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm")

from transformers import AutoTokenizer
from vllm.tokenizers import detokenizer_utils
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens as stock
from vllm.v1.engine import logprobs

from serve.models import embedded
from serve.vllm_backend.patches.applying import apply
from serve.vllm_backend.patches.table import named


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.ensure("smollm2"))


@pytest.fixture
def patched(monkeypatch):
    for module in (detokenizer_utils, logprobs):
        monkeypatch.setattr(module, "convert_ids_list_to_tokens", stock)
    apply(named("token-texts"))


def test_texts_are_vllms_and_are_worked_out_once(patched, tokenizer, monkeypatch):
    draw = random.Random(0)
    ids = [draw.randrange(len(tokenizer)) for _ in range(2000)] * 2
    expected = [tokenizer.decode([token]) for token in ids]
    assert logprobs.convert_ids_list_to_tokens(tokenizer, ids) == expected
    monkeypatch.setattr(tokenizer, "decode", None)
    assert detokenizer_utils.convert_ids_list_to_tokens(tokenizer, ids[::-1]) == expected[::-1]
    assert logprobs.convert_ids_list_to_tokens(tokenizer, []) == []
