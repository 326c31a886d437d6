"""Tokens with drafts are those that the sampler would have said one after the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler

if not current_platform.is_cpu():
    pytest.skip("drafts are verified this way on a CPU alone", allow_module_level=True)

from serve.cpu_kernels import verification
from serve.cpu_kernels.verification import NONE, Verifier

VOCABULARY = 40


def sampling(temperatures: list[float], seeds: dict[int, int], logprobs: int | None = None) -> SamplingMetadata:
    temperature = torch.tensor(temperatures)
    generators = {row: torch.Generator().manual_seed(seed) for row, seed in seeds.items()}
    greedy = not any(temperatures)
    penalty = torch.zeros(len(temperatures))
    return SamplingMetadata(
        temperature=None if greedy else temperature,
        all_greedy=greedy,
        all_random=all(temperatures),
        top_p=None if greedy else torch.full((len(temperatures),), 0.9),
        top_k=None if greedy else torch.full((len(temperatures),), 20, dtype=torch.int32),
        generators=generators,
        max_num_logprobs=logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=penalty,
        presence_penalties=penalty,
        repetition_penalties=penalty + 1,
        output_token_ids=[[] for _ in temperatures],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def one_by_one(logits: list[torch.Tensor], temperatures, seeds, logprobs=None):
    """Each sequence's tokens without drafts: place by place, each with a call of the sampler's."""
    tokens, tops = [], []
    for row, places in enumerate(logits):
        alone = sampling([temperatures[row]], {0: seeds[row]} if row in seeds else {}, logprobs)
        made = [Sampler()(logits=place[None].clone(), sampling_metadata=alone) for place in places]
        tokens.append([int(each.sampled_token_ids) for each in made])
        tops.append([each.logprobs_tensors for each in made])
    return tokens, tops


def verified(logits, drafts, temperatures, seeds, logprobs=None):
    metadata = SimpleNamespace(
        num_draft_tokens=[len(each) for each in drafts],
        draft_token_ids=torch.tensor([token for each in drafts for token in each], dtype=torch.int32),
    )
    every = torch.cat(logits)
    output = Verifier(Sampler())(metadata, None, every, sampling(temperatures, seeds, logprobs))
    return output, RejectionSampler.parse_output(output.sampled_token_ids, VOCABULARY, (), output.logprobs_tensors)


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def logits() -> list[torch.Tensor]:
    """Of four sequences, with 3, 0, 5 and 1 drafts."""
    torch.manual_seed(3)
    return [torch.randn(count + 1, VOCABULARY) * 3 for count in (3, 0, 5, 1)]


GREEDY, MIXED, DRAWN = [0.0] * 4, [0.0, 0.7, 1.0, 0.0], [0.8, 0.7, 1.0, 1.3]
SEEDS = {0: 11, 1: 12, 2: 13, 3: 14}


@pytest.mark.parametrize("temperatures", [GREEDY, MIXED, DRAWN], ids=["greedy", "mixed", "drawn"])
@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
@pytest.mark.parametrize("logprobs", [None, 3])
def test_tokens_and_their_logprobs_are_those_without_drafts_up_to_the_first_wrong_draft(
    logits, temperatures, wrong, logprobs
):
    expected, tops = one_by_one(logits, temperatures, SEEDS, logprobs)
    drafts = [tokens[:-1] for tokens in expected]
    counts = [len(tokens) for tokens in expected]
    if wrong is not None:
        for row, draft in enumerate(drafts):
            if wrong < len(draft):
                draft[wrong] = (draft[wrong] + 1) % VOCABULARY
                counts[row] = wrong + 1
    output, (tokens, kept) = verified(logits, drafts, temperatures, SEEDS, logprobs)
    assert output.sampled_token_ids.shape == (4, 6)
    assert tokens == [tokens[:count] for tokens, count in zip(expected, counts, strict=True)]
    if logprobs is None:
        assert kept is None
        return
    for row, count in enumerate(counts):
        of_row = kept.slice_request(row, count)
        for place in range(count):
            wanted = tops[row][place]
            assert np.allclose(of_row.logprobs[place], wanted.logprobs[0])
            assert of_row.logprob_token_ids[place].tolist() == wanted.logprob_token_ids[0].tolist()
            assert of_row.sampled_token_ranks[place] == wanted.selected_token_ranks[0]


def test_beside_log_probabilities_of_another_shape_no_draft_counts(logits):
    expected, _ = one_by_one(logits, GREEDY, {})
    drafts = [tokens[:-1] for tokens in expected]
    metadata = SimpleNamespace(
        num_draft_tokens=[len(each) for each in drafts],
        draft_token_ids=torch.tensor([token for each in drafts for token in each], dtype=torch.int32),
    )
    for asked in (sampling(GREEDY, {}, -1), replace(sampling(GREEDY, {}, 2), logprob_token_ids={1: [3, 4]})):
        output = Verifier(Sampler())(metadata, None, torch.cat(logits), asked)
        assert output.sampled_token_ids.tolist() == [[tokens[0]] for tokens in expected]
        assert output.logprobs_tensors is not None


def test_a_seed_gives_the_next_step_the_numbers_that_it_had_without_drafts(logits):
    expected, _ = one_by_one([torch.cat([logits[2], logits[0]])], [1.0], {0: 5})
    drafts = expected[0][:5]
    drafts[2] = (drafts[2] + 1) % VOCABULARY  # three tokens are said: two right drafts, and one in place of the third
    metadata = SimpleNamespace(num_draft_tokens=[5], draft_token_ids=torch.tensor(drafts, dtype=torch.int32))
    asked = sampling([1.0], {0: 5})
    first = Verifier(Sampler())(metadata, None, logits[2], asked).sampled_token_ids[0]
    assert first.tolist() == [*expected[0][:3], NONE, NONE, NONE]
    again = Sampler()(logits=logits[2][3:4].clone(), sampling_metadata=asked)
    assert int(again.sampled_token_ids) == expected[0][3]


def test_what_is_said_in_place_of_a_draft_has_the_models_distribution():
    torch.manual_seed(0)
    count, probabilities = 4000, torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().repeat(2 * count, 1)
    metadata = SimpleNamespace(num_draft_tokens=[1] * count, draft_token_ids=torch.zeros(count, dtype=torch.int32))
    asked = sampling([1.0] * count, {})
    asked.top_p = asked.top_k = None
    tokens = Verifier(Sampler())(metadata, None, logits, asked).sampled_token_ids
    firsts = torch.bincount(tokens[:, 0], minlength=3) / count
    assert torch.allclose(firsts, probabilities, atol=0.03)
    right = tokens[:, 0] == 0
    assert (tokens[right, 1] != NONE).all() and (tokens[~right, 1] == NONE).all()
    assert torch.allclose(torch.bincount(tokens[right, 1], minlength=3) / right.sum(), probabilities, atol=0.04)


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        ({"loradock_fused": None}, "does not run in one call"),
        ({"model_config": SimpleNamespace(logits_processors=["mine:Processor"])}, "logits_processors"),
        ({"use_async_scheduling": True}, "async_scheduling"),
        ({}, ""),
    ],
)
def test_a_model_that_verifies_nothing_says_why(monkeypatch, runner, said):
    monkeypatch.setattr(verification, "_refusal", verification.NOT_HERE)
    usual = {
        "loradock_fused": object(),
        "model_config": SimpleNamespace(logits_processors=None),
        "use_async_scheduling": False,
        "sampler": Sampler(),
    }
    made = SimpleNamespace(**usual | runner)
    verification.load_model(lambda runner: None, made)
    assert said in verification.refusal() and bool(said) == bool(verification.refusal())
    assert hasattr(made, "rejection_sampler") == (not said)


def test_logits_that_vllm_computes_in_bfloat16_are_taken_too(logits):
    rounded = [each.bfloat16() for each in logits]
    expected, _ = one_by_one(rounded, GREEDY, {})
    _, (tokens, _) = verified(rounded, [each[:-1] for each in expected], GREEDY, {})
    assert tokens == expected
