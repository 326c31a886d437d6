"""What answers depend on is read from vLLM's sampling parameters, in a few numbers."""

from __future__ import annotations

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from serve.asgi.exchange import Parameters
from serve.vllm_backend.output_processor import OTHERS, parameters_of


def test_the_usual_request_has_length_and_temperature_alone():
    assert parameters_of(SamplingParams(max_tokens=9, temperature=0.3)) == Parameters(9, 0.3)
    assert parameters_of(SamplingParams(max_tokens=9, temperature=0.3, n=4, seed=5)) == Parameters(9, 0.3)
    assert parameters_of(None) is None


def test_structure_and_tools_are_told():
    structured = SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert parameters_of(structured, tools=True) == Parameters(9, 1.0, constrained=True, tools=True)


@pytest.mark.parametrize("others", [{"top_p": 0.9}, {"stop": ["\n"]}, {"min_tokens": 3}, {"repetition_penalty": 1.2}])
def test_whatever_else_shapes_an_answer_makes_another_digest(others):
    made = parameters_of(SamplingParams(max_tokens=9, **others))
    assert made.others and made == parameters_of(SamplingParams(max_tokens=9, **others))
    assert len({made.others, parameters_of(SamplingParams(max_tokens=9, top_p=0.5)).others}) == 2


def test_vllm_knows_each_of_them_still():
    assert set(OTHERS) <= set(SamplingParams.__struct_fields__)
