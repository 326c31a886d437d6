"""A token is counted as vLLM counts it, by less."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats, PrefillStats

from serve.vllm_backend.output_processor import Outputs
from serve.vllm_backend.vllm_metrics import observe_all


def processor(lean):
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(30)}, unk_token="w0"))
    words.decoder = decoders.Fuse()
    processor = OutputProcessor(PreTrainedTokenizerFast(tokenizer_object=words), log_stats=True)
    if lean:
        processor.__class__, processor.lean_stats = Outputs, True
    rest = dict.fromkeys(("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank"))
    for id in ("a", "b"):
        params = SamplingParams(max_tokens=9, output_kind=RequestOutputKind.DELTA)
        request = EngineCoreRequest(id, [1, 2], sampling_params=params, arrival_time=0.0, external_req_id=id, **rest)
        processor.add_request(request, None, None, 0, RequestOutputCollector(params.output_kind, id))
    return processor


def steps():
    """The first token of each, some in the middle, a preemption, several tokens at once, and the end."""
    events = [EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0), EngineCoreEvent(EngineCoreEventType.SCHEDULED, 2.0)]
    prefill = PrefillStats(num_prompt_tokens=2, num_computed_tokens=2)
    yield 3.0, [EngineCoreOutput(id, [1], events=events, prefill_stats=prefill) for id in "ab"]
    yield 3.5, [EngineCoreOutput("a", [2]), EngineCoreOutput("b", [3, 4, 5])]
    yield 4.25, [EngineCoreOutput("a", [2], events=[EngineCoreEvent(EngineCoreEventType.PREEMPTED, 4.0)])]
    yield 5.0, [EngineCoreOutput("a", [6], num_nans_in_logits=1), EngineCoreOutput("gone", [1])]
    yield 6.0, [EngineCoreOutput(id, [7], finish_reason=FinishReason.LENGTH) for id in "ab"]


def test_counts_are_vllms():
    seen = []
    for lean in (False, True):
        tokens, rows = processor(lean), []
        states = dict(tokens.request_states)
        for now, outputs in steps():
            stats = IterationStats()
            stats.iteration_timestamp = now
            tokens.process_outputs(outputs, now, stats)
            rows.append(repr(stats))
        seen.append((rows, [repr(vars(state.stats)) for state in states.values()]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_waits_makes_the_histogram_that_each_of_them_makes(seed):
    choice, registry = random.Random(seed), CollectorRegistry()
    bounds = [0.01, 0.025, 0.05, 0.1, 1.0]
    stock, ours = (Histogram(name, name, buckets=bounds, registry=registry) for name in ("stock", "ours"))
    waits = [choice.choice([*bounds, 0.03, 0.0300001, 2.0, 80.0, 0.0]) for _ in range(200)]
    for wait in waits:
        stock.observe(wait)
    observe_all(ours, waits)
    sums = [
        {(sample.name, *sample.labels.items()): sample.value for sample in each._samples() if sample.name != "_created"}
        for each in (stock, ours)
    ]
    assert sums[0] == pytest.approx(sums[1])
