"""Fewer tokens; text whose tokens all stay is cut as before, any other can still be written."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import adapted, logits, opened
from optimize.errors import Refused
from optimize.evaluation import evaluate
from optimize.steps.prune import prune, vocabulary
from tests.optimize.conftest import sentences, silent
from tests.support.pico import WORDS

TEXT = " ".join(WORDS)


def trained(kind: str, size: int = 400):
    """A tokenizer of each kind, trained on some English and German."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    dice = random.Random(3)
    others = ["".join(dice.choices(["bra", "lun", "ter", "mok", "si", "va", "rin", "dol"], k=3)) for _ in range(200)]
    lines = [*sentences(7, 30), "Der Fluss läuft an der Stadt vorbei, jeden Morgen.", " ".join(others)] * 3
    special = ["<unk>", "<s>", "<end>"]
    if kind == "bpe":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size + 200, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>")
    else:
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    inner.train_from_iterator(lines, trainer)
    start = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="<end>", pad_token="<end>"
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_text_of_kept_tokens_is_cut_as_before(kind, tmp_path):
    from transformers import AutoTokenizer

    old = trained(kind)
    old.save_pretrained(tmp_path / "old")
    written = json.loads((tmp_path / "old/tokenizer.json").read_text())
    used = vocabulary.Counter(old(" ".join(WORDS[:30]), add_special_tokens=False).input_ids)
    kept = vocabulary.chosen(written, used, None, old.all_special_ids)
    assert len(kept) < len(old) and len(kept) % vocabulary.ROUND == 0
    places = {token: at for at, token in enumerate(kept)}
    (tmp_path / "old/tokenizer.json").write_text(json.dumps(vocabulary.rewritten(written, places)))
    new = AutoTokenizer.from_pretrained(tmp_path / "old")
    back = vocabulary.mapping(old, new)
    dice, same = random.Random(0), 0
    for _ in range(300):
        said = " ".join(dice.choices([*WORDS, "Fluss", "Stadt,", "läuft"], k=3))
        before, after = old(said).input_ids, new(said).input_ids
        assert new.decode(after, skip_special_tokens=True) == old.decode(before, skip_special_tokens=True)
        if set(before) <= set(kept):
            same += 1
            assert back[torch.tensor(after)].tolist() == before
    assert same > 5
    if kind == "bpe":  # any bytes at all
        assert new.decode(new("Ωmega 東京 \U0001f600").input_ids, skip_special_tokens=True) == "Ωmega 東京 \U0001f600"


@pytest.fixture
def wide(base, tmp_path, tokenizer):
    """The model with the byte-pair tokenizer and a row for each of its tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words, folder = trained("bpe"), tmp_path / "wide"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=[2, 1], bos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_the_trimmed_model_computes_what_the_original_did(wide, job):
    from transformers import AutoTokenizer

    made = job("prune", model=wide, vocabulary=448)
    notes = prune.run(made, silent)
    new = Checkpoint(made.folder / "model")
    assert notes["vocabulary"] == new.config["vocab_size"] == 448 < notes["vocabulary_before"]
    assert new.entries["model.embed_tokens.weight"].shape == (448, 64) and new.tied
    assert notes["bytes_saved"] == (notes["vocabulary_before"] - 448) * 64 * 2
    old_words, words = AutoTokenizer.from_pretrained(wide), AutoTokenizer.from_pretrained(new.folder)
    assert [words.convert_ids_to_tokens(one) for one in new.config["eos_token_id"]] == ["<end>", "<s>"]
    kept = vocabulary.mapping(old_words, words)
    ids = torch.tensor([words(TEXT).input_ids])
    right = logits(opened(wide, torch.float32), kept[ids])[..., kept]
    assert torch.equal(logits(opened(new.folder, torch.float32), ids), right)


def test_scores_are_told_in_the_originals_tokens(wide, job):
    """The network is the same, so KL is nothing; the text takes more tokens, and that is what it costs."""
    import msgspec

    made = job("prune", model=wide, vocabulary=320)
    prune.run(made, silent)
    asked = job("evaluate", model=made.folder / "model", out="scores", format="vllm")
    scores = evaluate.run(msgspec.structs.replace(asked, base=str(wide), reference=str(wide)), silent)["scores"]
    assert scores["kl"] < 1e-5 and scores["top1"] == 1.0
    assert scores["tokens_ratio"] > 1.02
    # An untrained model knows nothing: each of its tokens costs the logarithm of their number.
    assert math.log(scores["perplexity"]) == pytest.approx(scores["tokens_ratio"] * math.log(320), rel=0.02)


@pytest.mark.parametrize("options", [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_an_adapters_rows_follow_the_vocabulary(options, wide, job, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(2)
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32), LoraConfig(r=4, **options)
    )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    wrapped.save_pretrained(tmp_path / "one")
    made = job("prune", model=wide, adapters={"one": tmp_path / "one"}, vocabulary=384)
    notes = prune.run(made, silent)
    assert notes["adapters"] == {"one": "rewritten: its rows follow the vocabulary"}
    kept = vocabulary.mapping(AutoTokenizer.from_pretrained(wide), AutoTokenizer.from_pretrained(made.folder / "model"))
    ids = torch.arange(5, 25).view(1, 20)
    with adapted(opened(wide, torch.float32), tmp_path / "one") as model:
        right = logits(model, kept[ids])[..., kept]
    with adapted(opened(made.folder / "model", torch.float32), made.folder / "adapters/one") as model:
        assert torch.allclose(logits(model, ids), right, atol=1e-5)


def test_a_vocabulary_that_cannot_hold_what_must_stay_is_refused(wide, job):
    with pytest.raises(Refused, match="does not hold the"):
        prune.run(job("prune", model=wide, vocabulary=100), silent)
