"""Streams whose pieces vLLM makes of the text: calls of tools, a model's thoughts before it answers, log-probabilities.

vLLM's generator asks the parser for each piece, puts it into a chunk of three models and writes their JSON. Chunks of a
stream are alike but for the piece. So once one went by, the fast stream asks the same parser what it would be asked
anyway, and writes the piece's JSON in the place of the first one's. What the generator has to know goes its way: the
first call of a tool, by which it says why an answer ended, whatever comes with the end, and errors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.logprobs import Logprob

from serve.asgi.exchange import watching


class ParsedDeltas:
    """The parser of one stream; raises AttributeError or TypeError where it cannot be put before it. None: the text is
    the piece.

    Of the tokens that vLLM's generator is given next, `ahead` have been parsed already, and `told` have had their
    log-probabilities written.
    """

    def __init__(self, parser: Any = None) -> None:
        self._parser = weakref.ref(parser) if parser is not None else None  # it holds this
        self._logprobs_of: Callable[..., Any] | None = None
        # How many of the likeliest tokens the client wants, if all of them are told by their text.
        self._top: int | None = None
        self._request: Any = None
        self._prompt: Any = None
        self._pending: DeltaMessage | None = None
        self._failure: Exception | None = None
        self._tools_told = False
        self.begun = False
        self.ahead = self.told = 0
        if parser is not None:
            parser.parse_delta = self._parse_for_vllm

    def logprobs(self, tokens: Sequence[int], values: Any) -> bytes:
        """The JSON of tokens' log-probabilities, as vLLM makes it."""
        assert self._logprobs_of is not None
        self.told += len(tokens)
        if self._top is not None and (plain := logprobs_json(tokens, values, self._top)) is not None:
            return plain
        models = self._logprobs_of(token_ids=tokens, top_logprobs=values)
        return bytes(models.model_dump_json(exclude_unset=True).encode())

    def logprobs_for_vllm(self, make: Callable[..., Any], top: int | None, token_ids: Any, top_logprobs: Any) -> Any:
        """Of those tokens that were not told yet."""
        self._logprobs_of, self._top = make, top
        told, self.told = self.told, 0
        if self._parser is None:
            self.begun, self.ahead = True, 0
        return make(token_ids=token_ids[told:], top_logprobs=top_logprobs[told:])

    def _parse(self, **arguments: Any) -> DeltaMessage | None:
        if self._parser is None:
            return DeltaMessage(content=arguments["delta_text"])
        parser: Any = self._parser()
        delta: DeltaMessage | None = type(parser).parse_delta(parser, **arguments)
        return delta

    def parse(self, text: str, tokens: Sequence[int]) -> DeltaMessage | None:
        """The next piece, if there is one; Handover if vLLM's generator has to send it, or to say what went wrong."""
        self.ahead += len(tokens)
        try:
            delta = self._parse(
                delta_text=text,
                delta_token_ids=list(tokens),
                request=self._request,
                prompt_token_ids=self._prompt,
                finished=False,
            )
        except Exception as error:
            self._failure = error
            raise Handover from error
        if delta is not None and delta.tool_calls and not self._tools_told:
            self._pending = delta
            raise Handover
        return delta

    def _parse_for_vllm(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        self.begun = True
        self._request, self._prompt = request, prompt_token_ids
        tokens, self.ahead = delta_token_ids[self.ahead :], 0
        pending, self._pending = self._pending, None
        if self._failure is not None:
            raise self._failure
        delta = pending
        if pending is None or tokens or delta_text or finished:
            parsed = self._parse(
                delta_text=delta_text,
                delta_token_ids=tokens,
                request=request,
                prompt_token_ids=prompt_token_ids,
                finished=finished,
            )
            delta = joined(pending, parsed)
        self._tools_told = self._tools_told or bool(delta is not None and delta.tool_calls)
        return delta


class Handover(Exception):
    """vLLM's generator sends the next piece."""


def joined(first: DeltaMessage | None, second: DeltaMessage | None) -> DeltaMessage | None:
    """Two pieces as one."""
    if first is None or second is None:
        return second if first is None else first
    fields: dict[str, Any] = {}
    for name in ("content", "reasoning", "tool_calls"):
        pieces = [piece for delta in (first, second) if (piece := getattr(delta, name))]
        if pieces:
            fields[name] = pieces[0] if len(pieces) == 1 else pieces[0] + pieces[1]
    return DeltaMessage(**fields)


def delta_json(delta: DeltaMessage) -> bytes:
    """What vLLM makes of a piece; of a text alone without its model's serializer."""
    if delta.model_fields_set == {"content"} and isinstance(delta.content, str):
        return b'{"content":%b}' % to_json(delta.content)
    return delta.model_dump_json(exclude_unset=True).encode()


def logprobs_json(tokens: Sequence[int], values: Sequence[dict[int, Logprob] | None], top: int) -> bytes | None:
    """The JSON of vLLM's models of log-probabilities without the models, which take five times as long. None where one
    has no text, or is none of its step's."""
    content = []
    for token, step in zip(tokens, values, strict=True):
        if step is None or token not in step:
            return None
        of_step = list(step.values())
        if any(each.decoded_token is None for each in of_step):
            return None
        content.append(_told(step[token]) | {"top_logprobs": [_told(each) for each in of_step[:top]]})
    return to_json({"content": content}, inf_nan_mode="null")


def _told(value: Logprob) -> dict[str, Any]:
    text = value.decoded_token or ""
    return {"token": text, "logprob": max(value.logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}


def make_parser(original: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """vLLM's parser of a request, through which its fast stream may ask too."""
    parser = original(*arguments, **more)
    watch = watching.get()
    if watch is not None and watch.fast_stream is not None:
        try:
            watch.fast_stream.parser = ParsedDeltas(parser)
        except (AttributeError, TypeError):  # vLLM's way it is
            watch.fast_stream.parser = None
    return parser


def create_chat_logprobs(
    original: Callable[..., Any], serving: Any, token_ids: Any, top_logprobs: Any, *arguments: Any, **more: Any
) -> Any:
    """vLLM's models of log-probabilities, of tokens whose fast stream has not told them."""
    watch = watching.get()
    parser = watch.fast_stream.parser if watch is not None and watch.fast_stream is not None else None
    if not isinstance(parser, ParsedDeltas) or arguments:
        return original(serving, token_ids, top_logprobs, *arguments, **more)
    by_number, top = more.get("return_as_token_id"), more.get("num_output_top_logprobs") or 0
    if by_number is None:
        by_number = serving.return_tokens_as_token_ids
    by_text = not by_number and not more.get("logprob_token_ids") and top >= 0
    make = partial(original, serving, **more)
    return parser.logprobs_for_vllm(make, top if by_text else None, token_ids, top_logprobs)
