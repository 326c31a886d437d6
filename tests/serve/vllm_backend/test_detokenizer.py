"""A look into a table says of every sequence what vLLM's own detokenizer says, token by token."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from serve.vllm_backend.detokenizer import TableDetokenizer, TokenTexts, look_up

TEXT = "Zürich 12 °C — 東京は雨 😀👩‍👩‍👧 naïve \ufffd \x00 don't stop; \u0301 ﷽ ก็ "


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, some pairs of them, and special tokens; many a token is a part of a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|end|>", "<|start|>"])
    backend.add_tokens([AddedToken("<note>", normalized=False), AddedToken("é ü", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def started(tokenizer, prompt, **params):
    rest = dict.fromkeys(("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank"))
    params = SamplingParams(max_tokens=100, **params)
    request = EngineCoreRequest("r", prompt, sampling_params=params, arrival_time=0.0, external_req_id="r", **rest)
    return FastIncrementalDetokenizer(tokenizer, request)


@pytest.mark.parametrize("seed", range(60))
def test_any_tokens_have_the_text_that_vllm_gives_them(tokenizer, seed):
    choice = random.Random(seed)
    ids, texts = list(range(len(tokenizer))), TokenTexts.of(tokenizer)
    said = tokenizer.encode(TEXT, add_special_tokens=False)
    prompt = said[: choice.randrange(1, len(said))]  # it may end within a character
    tokens = said[len(prompt) :] if seed % 3 == 0 else choice.choices(ids, k=80)
    tokens += choice.choices(said, k=20)
    stock, ours = started(tokenizer, prompt), started(tokenizer, prompt)
    look_up(ours, texts)
    assert type(ours) is TableDetokenizer
    for token in tokens:
        stock.update([token], False)
        ours.update([token], False)
        assert ours.get_next_output_text(False, True) == stock.get_next_output_text(False, True)
    assert (ours.output_text, ours.token_ids) == (stock.output_text, stock.token_ids)


def test_strings_that_end_an_answer_are_found(tokenizer):
    said = tokenizer.encode("one two. three", add_special_tokens=False)
    stock, ours = (started(tokenizer, [1], stop=["two."]) for _ in range(2))
    look_up(ours, TokenTexts.of(tokenizer))
    for token in said:
        assert ours.update([token], False) == stock.update([token], False)
    assert ours.output_text == stock.output_text


def test_where_a_token_depends_on_its_neighbours_vllms_way_is_taken(tokenizer):
    metaspace = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    metaspace.decoder = decoders.Metaspace()
    assert TokenTexts.of(PreTrainedTokenizerFast(tokenizer_object=metaspace)) is None
    assert TokenTexts.of(None) is None
    spelled = started(tokenizer, [1], skip_special_tokens=False)
    look_up(spelled, TokenTexts.of(tokenizer))
    assert type(spelled) is FastIncrementalDetokenizer, "special tokens are in the text, with or without spaces"


def test_what_is_no_token_has_no_text(tokenizer):
    stock, ours = started(tokenizer, [1]), started(tokenizer, [1])
    look_up(ours, TokenTexts.of(tokenizer))
    for token in (65, 10**6, -1, 2**40, 66):
        stock.update([token], False)
        ours.update([token], False)
    assert ours.output_text == stock.output_text
