"""Embeddings and output layers of an adapter's own in vLLM's layers: PEFT's for each row, beside other adapters' rows.

vLLM's own CPU path is the stand-in for its GPU path: the same layers, the same calls.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("its layers are built on a CPU", allow_module_level=True)

from serve.vllm_backend.worker_extension import LOADED
from tests.support import peft_kinds
from tests.support.vllm_worker import LayersOnly, one_worker

TOKENS = [3, 7, 30]
KINDS: dict[str, dict[str, Any]] = {
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "output": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens of each": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [1, 30]}},
    "none": {},
}


@pytest.fixture(scope="module", autouse=True)
def worker(tmp_path_factory):
    with one_worker(tmp_path_factory.mktemp("init")):
        yield


def base_of(tied: bool) -> Any:
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(peft_kinds.base().config)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By whether its tables are tied: the model of transformers', and its folder."""
    folders = {}
    for tied in (False, True):
        model, folder = base_of(tied), tmp_path_factory.mktemp(f"base-{tied}")
        model.save_pretrained(folder)
        folders[tied] = (model, folder)
    return folders


def adapter(base: Any, folder: Path, seed: int, changed: int | None = None, **settings: Any) -> Any:
    """One of PEFT's, saved in `folder` as if it were trained; `changed`: so many rows of its tables only."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter[:changed] += torch.randn(parameter[:changed].shape, generator=draw) * 0.3
    model.save_pretrained(folder)
    return model.eval()


def tables(model: Any, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tree = model.base_model.model if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        return tree.model.embed_tokens(tokens), tree.lm_head(hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_each_row_of_a_mixed_batch_is_pefts(bases, tied, tmp_path):
    base, folder = bases[tied]
    kinds = [kind for kind in KINDS if tied or kind != "tied"]
    engine = LayersOnly(folder)
    draw = torch.Generator().manual_seed(9)
    for first in range(0, len(kinds), 4):
        batch = dict(enumerate(kinds[first : first + 4], first + 1))
        models = {0: base}
        for number, kind in batch.items():
            models[number] = adapter(base, tmp_path / kind, number, **KINDS[kind])
            assert engine.load(tmp_path / kind, number) == LOADED
        ids = [*batch, 0, *reversed(batch), 0]
        tokens = torch.tensor([TOKENS[row % 3] if row % 2 else 5 for row in range(len(ids))])
        hidden = torch.randn(len(ids), peft_kinds.HIDDEN, generator=draw)
        engine.step(ids)
        embedded, logits = engine.embedded(tokens), engine.logits(hidden)
        for row, number in enumerate(ids):
            own = tables(models[number], tokens[row : row + 1], hidden[row : row + 1])
            torch.testing.assert_close(embedded[row], own[0][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits[row], own[1][0], atol=1e-4, rtol=1e-4)
        engine.step([0] * len(ids))
        torch.testing.assert_close(engine.embedded(tokens), tables(base, tokens, hidden)[0])
        assert not engine.saved.embeds()


def test_of_a_table_whose_rows_are_mostly_the_bases_the_others_alone_are_kept(bases, tmp_path):
    base, folder = bases[False]
    engine = LayersOnly(folder)
    model = adapter(base, tmp_path, 1, changed=2, **KINDS["both"])
    assert engine.load(tmp_path, 1) == LOADED
    (embedding,), (output,) = engine.saved._embeddings.values(), engine.saved._outputs.values()
    assert embedding.tokens.tolist() == output.tokens.tolist() == [0, 1]
    engine.step([1, 1])
    tokens, hidden = torch.tensor([1, 2]), torch.randn(2, peft_kinds.HIDDEN)
    own = tables(model, tokens, hidden)
    torch.testing.assert_close(engine.embedded(tokens), own[0])
    torch.testing.assert_close(engine.logits(hidden), own[1], atol=1e-4, rtol=1e-4)


def test_a_slot_forgets_the_tables_of_the_adapter_before(bases, tmp_path):
    base, folder = bases[False]
    engine = LayersOnly(folder)
    adapter(base, tmp_path / "both", 1, **KINDS["both"])
    adapter(base, tmp_path / "none", 2)
    engine.load(tmp_path / "both", 1)
    engine.adapters.deactivate_adapter(1)
    engine.load(tmp_path / "none", 2)
    engine.step([2, 2])
    tokens, hidden = torch.tensor([1, 2]), torch.randn(2, peft_kinds.HIDDEN)
    own = tables(base, tokens, hidden)
    torch.testing.assert_close(engine.embedded(tokens), own[0])
    torch.testing.assert_close(engine.logits(hidden), own[1], atol=1e-4, rtol=1e-4)


def test_logits_are_capped_and_scaled_as_the_bases_are(bases, tmp_path):
    base, folder = bases[False]
    engine = LayersOnly(folder)
    model = adapter(base, tmp_path, 1, **KINDS["output"])
    engine.load(tmp_path, 1)
    for module in engine.model.modules():
        if hasattr(module, "soft_cap") and not hasattr(module, "base_layer"):
            module.soft_cap, module.scale = 0.5, 3.0
    engine.step([1])
    hidden = torch.randn(1, peft_kinds.HIDDEN)
    plain = tables(model, torch.tensor([1]), hidden)[1]
    torch.testing.assert_close(engine.logits(hidden), torch.tanh(plain / 0.5) * 1.5, atol=1e-4, rtol=1e-4)


def test_what_the_engine_does_not_serve_is_refused_in_a_sentence(bases, tmp_path):
    base, folder = bases[False]
    engine = LayersOnly(folder)
    adapter(base, tmp_path / "both", 1, **KINDS["both"])
    engine.config.parallel_config.world_size = 2
    assert "spread over devices" in engine.load(tmp_path / "both", 1)
    engine.config.parallel_config.world_size = 1
    engine.runner.is_pooling_model = True
    assert "are served where text is generated: merge them" in engine.load(tmp_path / "both", 1)
    engine.runner.is_pooling_model = False
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(40)
    adapter(larger, tmp_path / "output", 2, **KINDS["output"])
    assert "its output layer has more tokens than its embedding" in engine.load(tmp_path / "output", 2)
    larger.resize_token_embeddings(2000)
    adapter(larger, tmp_path / "larger", 3, **KINDS["both"])
    assert "its table is of 2000 tokens and 32 columns, and the base's of 32 and 32" in engine.load(
        tmp_path / "larger", 3
    )


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_beyond_the_vocabulary_are_read_and_said_by_the_adapter_that_has_them(bases, tied, tmp_path):
    base, folder = bases[tied]
    engine = LayersOnly(folder)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    engine.runner.input_batch = SimpleNamespace(vocab_size=32, allowed_token_ids_mask=mask)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(35)
    models = {0: base}
    for number, settings in enumerate((KINDS["both"], {"trainable_token_indices": [5, 32, 34]}), 1):
        models[number] = adapter(larger, tmp_path / str(number), number, **settings)
        assert engine.load(tmp_path / str(number), number) == LOADED
    ids, tokens = [1, 2, 0, 2, 1], torch.tensor([34, 32, 31, 5, 33])
    hidden = torch.randn(len(ids), peft_kinds.HIDDEN)
    engine.step(ids)
    embedded, logits = engine.embedded(tokens), engine.logits(hidden)
    assert logits.shape == (5, 35)
    for row, number in enumerate(ids):
        own = tables(models[number], tokens[row : row + 1], hidden[row : row + 1])
        torch.testing.assert_close(embedded[row], own[0][0], atol=1e-5, rtol=1e-5)
        # Of what was not trained nobody has a row.
        missing = {33} if tied else {32, 33, 34}
        columns = [column for column in range(own[1].shape[1]) if number != 2 or column not in missing]
        torch.testing.assert_close(logits[row, columns], own[1][0, columns], atol=1e-4, rtol=1e-4)
    assert logits[2, 32:].eq(-torch.inf).all(), "nobody else says them"
    batch = engine.runner.input_batch
    assert batch.vocab_size == 35 and batch.allowed_token_ids_mask[:, 32:].all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_heads_scores_stand_in_the_place_of_logits(bases, bias, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForSequenceClassification

    base, folder = bases[False]
    config = copy.deepcopy(base.config)
    config.num_labels = 3
    classifier = LlamaForSequenceClassification(config)
    classifier.model.load_state_dict(base.model.state_dict())
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier, settings).eval()
    model.save_pretrained(tmp_path / "head")
    added = torch.tensor([0.5, -1.0, 2.0]) if bias else torch.zeros(3)
    if bias:
        file = tmp_path / "head" / "adapter_model.safetensors"
        save_file(load_file(file) | {"base_model.model.score.bias": added}, file)
    adapter(base, tmp_path / "output", 2, **KINDS["output"])
    engine = LayersOnly(folder)
    assert engine.load(tmp_path / "head", 1) == engine.load(tmp_path / "output", 2) == LOADED
    engine.step([1, 0, 2, 1])
    hidden = torch.randn(4, peft_kinds.HIDDEN)
    logits = engine.logits(hidden)
    with torch.no_grad():
        scores = model.base_model.model.score(hidden) + added
        plain = base.lm_head(hidden)
    for row in (0, 3):
        likely = logits[row].log_softmax(-1)
        torch.testing.assert_close(likely[:3] - likely[3], scores[row], atol=1e-5, rtol=1e-5)
        assert likely[4:].eq(-torch.inf).all()
    torch.testing.assert_close(logits[1], plain[1], atol=1e-4, rtol=1e-4)
    assert (logits[2] - plain[2]).abs().max() > 0.05
