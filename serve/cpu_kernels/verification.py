"""Whether the drafts of a step are what its sequences would have said.

A draft is a token that stands for certain, so it needs no probabilities of its own: the sampler is asked for the token
that follows what is sure, as in a step without drafts. As long as it says what was drafted, the logits of the next
place are right too, and it is asked again. That is rejection sampling for drafts of probability 1: a draft is accepted
with the probability that the model gives it, and what comes in its place has the model's distribution. Nothing is drawn
for places that do not count, so that a request with a seed gets the same numbers as without drafts.

vLLM computes the drafts of a step as it computes the tokens of a prompt; its own way to verify them comes with
`speculative_config`, which refuses requests with `min_p` or `logit_bias` and pads every sequence's first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors

NOT_HERE = "the model is in another process than the scheduler"
NONE = -1  # no token
GREEDY = 1e-5  # of vLLM's sampler: below that temperature it draws nothing

_refusal = NOT_HERE


def refusal() -> str:
    """Why this process's model verifies no drafts; "" if it does."""
    return _refusal


def counts(most: int) -> Any:
    """What vLLM counts a request's drafts in, of up to `most` a step."""
    return RequestSpecDecodeMetrics.new(most)


def load_model(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
    """vLLM's, after which the runner can verify drafts."""
    global _refusal
    original(runner, *args, **kwargs)
    _refusal = ""
    if getattr(runner, "loradock_fused", None) is None:
        _refusal = "the model does not run in one call a step"
    elif runner.model_config.logits_processors:
        _refusal = "logits_processors are set, which may look at whole answers"
    elif runner.use_async_scheduling:
        _refusal = "async_scheduling is on"
    else:
        runner.rejection_sampler = Verifier(runner.sampler)


def prepare_inputs(original: Callable[..., Any], runner: Any, scheduler_output: Any, scheduled: np.ndarray) -> Any:
    """vLLM's, which asks for the logits of all drafts too."""
    prepared = original(runner, scheduler_output, scheduled)
    drafts = scheduler_output.scheduled_spec_decode_tokens
    if not drafts:
        return prepared
    counts = np.array([len(drafts.get(name, ())) for name in runner.input_batch.req_ids], dtype=np.int32)
    metadata = runner._calc_spec_decode_metadata(counts, np.cumsum(scheduled, dtype=np.int32))
    if runner.lora_config:
        runner.set_active_loras(runner.input_batch, scheduled, counts + 1)
    return metadata.logits_indices, metadata, int(counts.max()) + 1


class Verifier:
    """In the place of vLLM's RejectionSampler, which has kernels of its own for it."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __call__(self, metadata: Any, draft_probs: None, logits: torch.Tensor, sampling: Any) -> SamplerOutput:
        """Of each sequence its sampled tokens and NONE behind them: (sequences, most drafts + 1)."""
        counts: list[int] = metadata.num_draft_tokens
        starts = np.cumsum([0, *(count + 1 for count in counts[:-1])])
        output = self._sampler(logits=logits[torch.from_numpy(starts)], sampling_metadata=sampling)
        if sampling.max_num_logprobs == -1 or sampling.logprob_token_ids:
            return output  # somebody's log-probabilities are of a shape of their own: no draft counts
        drafts = np.split(metadata.draft_token_ids.numpy(), np.cumsum(counts)[:-1])
        sampled = torch.full((len(counts), max(counts) + 1), NONE, dtype=torch.int32)
        best = None
        if sampling.all_greedy and sampling.max_num_logprobs is None:
            best = self._sampler.greedy_sample(logits.to(torch.float32)).tolist()
        columns: list[tuple[Sequence[int], SamplerOutput]] = [(range(len(counts)), output)]
        sampled[:, 0] = output.sampled_token_ids[:, 0]
        going = [i for i in range(len(counts)) if counts[i] and sampled[i, 0] == drafts[i][0]]
        place = 0
        while going:
            place += 1
            if best is not None:
                said = [best[starts[i] + place] for i in going]
            else:
                rows = torch.from_numpy(starts[going] + place)
                output = self._sampler(logits=logits[rows], sampling_metadata=_of(sampling, going))
                columns.append((going, output))
                said = output.sampled_token_ids[:, 0].tolist()
            for i, token in zip(going, said, strict=True):
                sampled[i, place] = token
            going = [i for i, token in zip(going, said, strict=True) if counts[i] > place and token == drafts[i][place]]
        return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=_joined(columns, sampled.shape))


def _of(sampling: Any, sequences: Sequence[int]) -> Any:
    """Of these sequences, which have only what belongs to one token: who needs more gets no drafts."""
    rows = torch.tensor(sequences)
    drawn = torch.zeros(len(sequences), dtype=torch.bool)
    if sampling.temperature is not None:
        drawn = sampling.temperature[rows] >= GREEDY
    return replace(
        sampling,
        temperature=sampling.temperature[rows] if drawn.any() else None,
        all_greedy=not drawn.any(),
        all_random=bool(drawn.all()),
        top_p=None if sampling.top_p is None else sampling.top_p[rows],
        top_k=None if sampling.top_k is None else sampling.top_k[rows],
        generators={
            row: sampling.generators[sequence]
            for row, sequence in enumerate(sequences)
            if sequence in sampling.generators
        },
        no_penalties=True,
        prompt_token_ids=None,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        logprob_token_ids=None,
        spec_token_ids=None,
        thinking_budget_state_holder=None,
    )


def _joined(columns: list[tuple[Sequence[int], SamplerOutput]], shape: torch.Size) -> LogprobsTensors | None:
    """The log-probabilities of all places, one after the other; those without a token are not looked at."""
    first = columns[0][1].logprobs_tensors
    if first is None:
        return None
    parts = []
    for field in range(3):  # tokens, log-probabilities, ranks
        every = first[field].new_zeros((*shape, *first[field].shape[1:]))
        for place, (rows, output) in enumerate(columns):
            every[list(rows), place] = output.logprobs_tensors[field]
        parts.append(every.flatten(0, 1))
    return LogprobsTensors(*parts)
