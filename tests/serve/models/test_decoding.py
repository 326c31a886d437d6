"""The text of tokens is the library's, whichever way it is made."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from serve.models.decoding import Decoder

TEXTS = [
    "Where is the station, and when does the train leave?",
    "naïve café – 日本語 😀 привет",
    "x = {'a': 1}\n\tprint(x)",
]


def of_bytes():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("by hand – 日"), AddedToken("plain")])
    return tokenizer


def of_words():
    tokenizer = Tokenizer(models.WordLevel({"where": 0, "is": 1, "it": 2, "?": 3}, unk_token="?"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("made", [of_bytes, of_words])
def test_the_text_of_tokens_is_what_the_library_says(tmp_path, made, special):
    tokenizer = made()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    decode, rng = Decoder(tmp_path / "tokenizer.json"), np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.integers(0, tokenizer.get_vocab_size() + 2, rng.integers(0, 30)).tolist()
        assert decode(tokens, special=special) == tokenizer.decode(tokens, skip_special_tokens=not special)
