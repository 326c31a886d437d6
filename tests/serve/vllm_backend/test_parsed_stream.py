"""A parser of vLLM's that two ask: it sees each token once, in order, and nothing that it makes is lost."""

from __future__ import annotations

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.logprobs import Logprob

from serve.vllm_backend.parsed_stream import Handover, ParsedDeltas, delta_json, joined, logprobs_json


class Parser:
    """Says what it is told to."""

    def __init__(self):
        self.seen = []
        self.next = []

    def parse_delta(self, delta_text, delta_token_ids, request, prompt_token_ids=None, *, finished):
        self.seen.append((delta_text, list(delta_token_ids), finished))
        delta = self.next.pop(0) if self.next else DeltaMessage(content=delta_text)
        if isinstance(delta, Exception):
            raise delta
        return delta


def call(index, arguments):
    return DeltaMessage(tool_calls=[DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=arguments))])


@pytest.fixture
def asked():
    """The parser, the fast stream's side of it, and vLLM's side."""
    parser = Parser()
    deltas = ParsedDeltas(parser)

    def generator(text, tokens, finished=False):
        return parser.parse_delta(
            delta_text=text, delta_token_ids=tokens, request="r", prompt_token_ids=[1], finished=finished
        )

    assert generator("a", [1]).content == "a" and deltas.begun
    return parser, deltas, generator


def test_tokens_that_were_parsed_are_not_parsed_again_and_count_for_vllm(asked):
    parser, deltas, generator = asked
    assert deltas.parse("b", [2]).content == "b" and deltas.parse("", [3]).content == ""
    assert generator("d", [2, 3, 4], finished=True).content == "d"
    assert parser.seen == [("a", [1], False), ("b", [2], False), ("", [3], False), ("d", [4], True)]


def test_the_first_call_of_a_tool_is_told_by_vllm_and_later_ones_are_not(asked):
    parser, deltas, generator = asked
    parser.next = [first := call(0, "{"), second := call(0, "}"), third := call(1, "")]
    with pytest.raises(Handover):
        deltas.parse("b", [2])
    assert generator("", [2]) is first and len(parser.seen) == 2, "it was parsed already"
    assert deltas.parse("c", [3]) is second and deltas.parse("d", [4]) is third


def test_a_call_that_the_end_overtakes_is_told_with_it(asked):
    parser, deltas, generator = asked
    parser.next = [call(0, "{"), DeltaMessage(tool_calls=call(0, "}").tool_calls, content="x")]
    with pytest.raises(Handover):
        deltas.parse("b", [2])
    last = generator("c", [2, 3], finished=True)
    assert [each.function.arguments for each in last.tool_calls] == ["{", "}"] and last.content == "x"
    assert parser.seen[-1] == ("c", [3], True)


def test_an_error_is_vllms_to_tell(asked):
    parser, deltas, generator = asked
    parser.next = [RuntimeError("odd")]
    with pytest.raises(Handover):
        deltas.parse("b", [2])
    with pytest.raises(RuntimeError, match="odd"):
        generator("", [2])


@pytest.mark.parametrize("top", [0, 2])
def test_log_probabilities_are_told_as_vllms_models_tell_them(top):
    serving = OpenAIServingChat.__new__(OpenAIServingChat)
    serving.return_tokens_as_token_ids = False
    steps = [
        {7: Logprob(-0.12345678, 1, ' "Zürich'), 8: Logprob(-2.5, 2, "\n")},
        {9: Logprob(float("-inf"), 30, ""), 7: Logprob(-1e-9, 1, "\U0001f600"), 8: Logprob(float("nan"), 2, "a")},
    ]
    models = serving._create_chat_logprobs([7, 9], steps, None, num_output_top_logprobs=top or None)
    assert logprobs_json([7, 9], steps, top) == models.model_dump_json(exclude_unset=True).encode()


def test_log_probabilities_without_a_text_or_of_another_token_are_for_the_models():
    assert logprobs_json([7], [{7: Logprob(-1.0, 1, None)}], 1) is None
    assert logprobs_json([7], [{8: Logprob(-1.0, 1, "a")}], 1) is None
    assert logprobs_json([7], [None], 1) is None


@pytest.mark.parametrize(
    "delta",
    [
        DeltaMessage(content='a "quoted"\nline, Zürich'),
        DeltaMessage(content=""),
        DeltaMessage(content=None),
        DeltaMessage(),
        DeltaMessage(reasoning="so", content="a"),
        call(0, "{"),
    ],
)
def test_a_piece_is_told_as_its_model_tells_it(delta):
    assert delta_json(delta) == delta.model_dump_json(exclude_unset=True).encode()


def test_two_pieces_are_one():
    assert joined(None, None) is None
    assert joined(None, one := DeltaMessage(content="a")) is one and joined(one, None) is one
    both = joined(DeltaMessage(content="a", reasoning="b"), DeltaMessage(content="c"))
    assert both.model_dump(exclude_unset=True) == {"content": "ac", "reasoning": "b"}
