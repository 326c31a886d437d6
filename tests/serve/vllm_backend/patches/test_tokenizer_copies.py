"""A copy says what the tokenizer says, shares what is large, and nothing that a call sets."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("vllm")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from vllm.tokenizers import hf

from serve.vllm_backend.patches.tokenizer_copies import LARGE, make_thread_pool, shared_copy

TEXTS = ["The capital of France is Paris.", "<|im_start|>user\nüber 12 Ärzte<|im_end|>", "", "  spaces\n\n\ttabs"]


@pytest.fixture(scope="module")
def trained():
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    made.add_tokens([AddedToken("Paris", rstrip=True)])
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made.to_str()


@pytest.fixture
def tokenizer(trained):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), eos_token="<|im_end|>")


def test_it_says_the_same(tokenizer):
    made, deep = shared_copy(tokenizer), copy.deepcopy(tokenizer)
    assert made._tokenizer.to_str() == deep._tokenizer.to_str()
    for text in TEXTS:
        assert made(text).input_ids == deep(text).input_ids == tokenizer(text).input_ids
        assert made.decode(deep(text).input_ids) == deep.decode(deep(text).input_ids)
    assert made.all_special_tokens == deep.all_special_tokens and len(made) == len(deep)


def test_what_a_call_sets_is_its_own(tokenizer):
    made = shared_copy(tokenizer)
    made("a b c d e f g", truncation=True, max_length=2)
    made.add_tokens(["quite-new"])
    assert tokenizer._tokenizer.truncation is None and "quite-new" not in tokenizer.get_vocab()
    tokenizer._tokenizer.enable_truncation(3)
    assert shared_copy(tokenizer)._tokenizer.truncation == tokenizer._tokenizer.truncation


def test_a_vocabulary_that_a_class_keeps_beside_is_shared_and_all_else_is_its_own(tokenizer):
    tokenizer._vocab = {f"word {number}": number for number in range(LARGE)}
    tokenizer._merges = [(f"{number}", "!") for number in range(LARGE)]
    tokenizer.init_kwargs |= {"vocab": tokenizer._vocab, "some": ["thing"]}
    made = shared_copy(tokenizer)
    assert made._vocab is tokenizer._vocab is made.init_kwargs["vocab"] and made._merges is tokenizer._merges
    made.init_kwargs["some"].append("else")
    made.init_kwargs["more"] = 1
    assert tokenizer.init_kwargs["some"] == ["thing"] and "more" not in tokenizer.init_kwargs
    assert made(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "as vLLM reads it"])
def test_vllms_pool_has_such_copies(tokenizer, monkeypatch, cached):
    tokenizer = hf.get_cached_tokenizer(tokenizer) if cached else tokenizer
    original = getattr(hf.maybe_make_thread_pool, "loradock_original", hf.maybe_make_thread_pool)
    monkeypatch.setattr(
        type(tokenizer._tokenizer), "__deepcopy__", lambda *_: pytest.fail("a deep copy"), raising=False
    )
    said = [tokenizer(text).input_ids for text in TEXTS]
    pool = make_thread_pool(original, tokenizer, 2)
    assert isinstance(pool, hf.ThreadSafeHFTokenizerMixin) and not hasattr(pool, "__deepcopy__")
    assert [pool(text).input_ids for text in TEXTS] == said
    assert pool.decode(said[3]) == TEXTS[3]
    pool("a b c d e f g", truncation=True, max_length=2)
    assert pool(TEXTS[0]).input_ids == said[0]
