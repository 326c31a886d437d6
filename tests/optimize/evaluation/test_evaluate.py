"""Models are compared the same way whether memory holds them or a layer of them."""

from __future__ import annotations

import json
import weakref

import msgspec
import pytest
import torch

from optimize.checkpoint import model as models
from optimize.evaluation import evaluate
from optimize.steps.merge import merge
from optimize.steps.quantize import quantize
from tests.optimize.conftest import sentences, silent


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_layer_at_a_time_gives_the_same_scores(scheme, base, job, adapter, monkeypatch):
    one = {"one": adapter()}
    made = job("quantize", scheme=scheme, method="rtn", adapters=one)
    quantize.run(made, silent)
    asked = job("evaluate", model=made.folder / "model", adapters=one, out="scores", format="vllm")
    whole = evaluate.run(asked, silent)["scores"]
    read = []
    original = models._OnDisk.__init__
    monkeypatch.setattr(models._OnDisk, "__init__", lambda self, *given: read.append(1) or original(self, *given))
    assert evaluate.run(msgspec.structs.replace(asked, memory=1), silent)["scores"] == whole
    assert len(read) == 6  # three layers of the original and of the result
    assert torch.is_grad_enabled(), "whatever comes next in this process may train"


def test_small_weights_are_read_by_one_thread_for_an_answer_and_large_ones_by_all(base):
    """With two threads a product of a small model's took the processor twice as long, and no less time."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = models.opened(base)
        used = set()
        models.layers(model)[0].register_forward_pre_hook(lambda *_: used.add(torch.get_num_threads()))
        models.greedy(model, [[5, 6, 7]], 2, None)
        assert used == {1} and torch.get_num_threads() == 2
        models.layers(model)[0].wide = torch.nn.Parameter(torch.zeros(models.SHARED), requires_grad=False)
        models.greedy(model, [[5, 6, 7]], 2, None)
        assert used == {1, 2}
    finally:
        torch.set_num_threads(before)


def test_a_cosine_is_at_most_one_however_many_numbers_it_is_of():
    """In float32 the cosine of a tensor with itself was up to 1.0008."""
    torch.manual_seed(0)
    for size in ((48, 50_000), (1, 3_000_001)):
        one = torch.randn(size) * 1e-3 + 7
        assert evaluate._cosine(one, one) == pytest.approx(1.0, abs=1e-12) and evaluate._cosine(one, 3 * one) <= 1.0
        assert evaluate._cosine(one, -one) >= -1.0
    assert evaluate._cosine(torch.zeros(2, 3), one[:1, :3]) == 0.0


def test_after_a_merge_the_base_is_there_to_compare_with(base, job, adapter):
    """Base and adapter were the original by then: the rise of perplexity was 0, whatever the adapter did."""
    made = job("merge", adapters={"one": adapter(seed=3)}, names=("one",))
    merge.run(made, silent)
    model = str(made.folder / "model")
    asked = msgspec.structs.replace(job("evaluate", out="scores", format="vllm"), model=model, reference=model)
    scores = evaluate.run(asked, silent)["scores"]
    assert scores["perplexity_increase"] == 0.0 and scores["perplexity"] != scores["perplexity_base"]
    alone = evaluate.run(msgspec.structs.replace(asked, reference=str(base)), silent)["scores"]
    assert scores["perplexity_base"] == alone["perplexity_original"] and "perplexity_base" not in alone
    assert scores["perplexity_base_increase"] == pytest.approx(alone["perplexity_increase"], abs=1e-4)


def test_a_merged_model_is_opened_once_and_without_the_base_beside_it(base, job, adapter, monkeypatch):
    """Three copies of the weights stood beside one another without bfloat16: 1.99 GB for 135M, and 1.48 planned."""
    made = job("merge", adapters={"one": adapter(seed=3)}, names=("one",))
    merge.run(made, silent)
    model = str(made.folder / "model")
    alive, most = weakref.WeakSet(), []

    def opened(*args, **named):
        alive.add(model := models.opened(*args, **named))
        most.append(len(alive))
        return model

    monkeypatch.setattr(evaluate, "opened", opened)
    asked = msgspec.structs.replace(job("evaluate", out="scores", format="vllm"), model=model, reference=model)
    evaluate.run(asked, silent)
    assert most == [1, 1]


def test_logits_are_gone_when_the_next_are_made():
    """With 151,936 tokens the last window's took a quarter of what evaluating 0.5B needed."""
    alive, most = weakref.WeakSet(), []

    def logits():
        alive.add(one := torch.randn(1, 6, 32))
        return one

    def made():
        for _ in range(3):
            most.append(len(alive))
            yield logits()

    evaluate.compared(made(), made(), [torch.zeros(1, 6, dtype=torch.long)] * 3, lambda _: None)
    assert most == [0, 1] * 3


@pytest.mark.parametrize("sure", [200.0, 2000.0])
def test_a_result_that_is_sure_of_wrong_tokens_has_a_perplexity_all_the_same(sure):
    """Of 700 nats a token, or from the least to the most of two windows far apart, ended in an OverflowError."""
    rows = [torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0]])]
    wrong = torch.tensor([sure, 0.0, 0.0]).expand(1, 4, 3)  # of the first window's tokens, right of the second's
    scores = evaluate.compared([torch.zeros(1, 4, 3)] * 2, [wrong] * 2, rows, lambda _: None)
    assert scores["perplexity_original"] == 3 and scores["log_perplexity"] == sure / 2
    assert scores["perplexity"] > 1e40 and scores["intervals"]["perplexity_increase"][1] > 1e300


def test_greedy_tokens_of_many_prompts_with_a_cache_are_those_of_each_without(base):
    model = models.opened(base, torch.float32)
    prompts = [[2, 9, 4, 17], [5], [3, 3, 8, 21, 40, 7, 6]]
    alone = []
    for ids in prompts:
        said: list[int] = []
        for _ in range(12):
            said.append(int(models.logits(model, torch.tensor([[*ids, *said]]))[0, -1].argmax()))
        alone.append(said)
    assert models.greedy(model, prompts, 12, None) == alone
    end = alone[1][3]
    assert models.greedy(model, prompts, 12, end) == [
        said[: said.index(end)] if end in said else said for said in alone
    ]


def test_scores_come_with_where_they_lie_for_all_windows(base, job, adapter, tmp_path):
    one = {"one": adapter()}
    made = job("quantize", scheme="w4a16", method="rtn", adapters=one)
    quantize.run(made, silent)
    asked = job("evaluate", model=made.folder / "model", adapters=one, out="scores", format="vllm")
    scores = evaluate.run(asked, silent)["scores"]
    for name in ("kl", "top1", "perplexity_increase", "worst_adapter_kl", "worst_adapter_effect"):
        low, high = scores["intervals"][name]
        assert low < scores[name] < high, name
    assert scores["adapters"]["one"]["own_text"] is False
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(9, 80)))
    part = msgspec.structs.replace(asked.evaluate, adapter_texts={"one": str(own)})
    on_its_own = evaluate.run(msgspec.structs.replace(asked, evaluate=part), silent)["scores"]
    assert on_its_own["adapters"]["one"]["own_text"] is True and on_its_own["kl"] == scores["kl"]
    assert on_its_own["adapters"]["one"]["kl"] != scores["adapters"]["one"]["kl"]
