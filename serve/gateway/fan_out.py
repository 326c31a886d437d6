"""How much one request asks of an engine: its sequences, the inputs of its batch, the prompt tokens that it has scored.

A request takes a seat for each of its sequences, and one for every `TOKENS_PER_SEAT` tokens of a prompt whose
log-probabilities it asks for: the engine computes those all at once, and nothing of them comes from a cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.auth.rate_limits import Limits
from serve.errors import BadRequest
from serve.names import shown

# vLLM's token-in-token-out route: what others ask at the top of a body is in `sampling_params` there.
GENERATE = "/inference/v1/generate"
TOKENS_PER_SEAT = 64
BYTES_PER_TOKEN = 4
# Those that generate nothing, and take a batch of inputs.
_POOLING = re.compile(r"/v1/(embeddings|classify|score|rerank)|/(pooling|classify|score|rerank|v2/rerank)")
_PAIRS = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """What one request may ask for; a key's own limits take the place of the server's."""

    sequences: int = 256
    prompt_logprobs: int = 20
    batch: int = 2048

    def of(self, limits: Limits) -> RequestBounds:
        return RequestBounds(
            self.sequences if limits.sequences is None else limits.sequences,
            self.prompt_logprobs if limits.prompt_logprobs is None else limits.prompt_logprobs,
            self.batch if limits.batch is None else limits.batch,
        )


@dataclass(frozen=True, slots=True)
class FanOut:
    """`inputs` of a batch times `n` answers to each; `prompt_logprobs` for each of about `scored` prompt tokens."""

    inputs: int = 1
    n: int = 1
    prompt_logprobs: int = 0
    scored: int = 0
    pooling: bool = False

    @property
    def seats(self) -> int:
        return self.inputs * self.n + self.scored // TOKENS_PER_SEAT

    @classmethod
    def of(cls, path: str, fields: Mapping[str, Any], size: int) -> FanOut:
        """What a request of `size` bytes asks for; BadRequest, where a number is none."""
        if _POOLING.fullmatch(path):
            return cls(inputs=_batch(fields), pooling=True)
        if path == GENERATE:
            fields = _sampling(fields)
        logprobs = _prompt_logprobs(path, fields)
        scored = size // BYTES_PER_TOKEN if logprobs else 0
        return cls(_prompts(path, fields), max(1, _whole(fields, "n", 1)), logprobs, scored)

    def check(self, bounds: RequestBounds) -> None:
        """BadRequest, if that is more than one request may ask for."""
        if self.pooling:
            if self.inputs > bounds.batch:
                raise BadRequest(
                    f"the request holds {self.inputs} inputs, and one request takes up to {bounds.batch}: "
                    "send it in parts",
                    param="input",
                )
            return
        if (sequences := self.inputs * self.n) > bounds.sequences:
            raise BadRequest(
                f"`n` {self.n} times {self.inputs} prompts is {sequences} answers, and one request takes up to "
                f"{bounds.sequences}: send it in parts",
                param="n" if self.n > 1 else "prompt",
            )
        if not 0 <= self.prompt_logprobs <= bounds.prompt_logprobs:
            raise BadRequest(
                f"log-probabilities of the prompt are asked for with {self.prompt_logprobs} alternatives (-1 is all), "
                f"and a request takes up to {bounds.prompt_logprobs}",
                param="prompt_logprobs",
            )


def _sampling(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """`sampling_params`, as the other routes have them; the scores of chosen tokens cost what one alternative does."""
    sampling = fields.get("sampling_params") or {}
    if sampling.get("prompt_logprob_token_ids") is None:
        return sampling
    return {**sampling, "prompt_logprobs": sampling.get("prompt_logprobs") or 1}


def _prompts(path: str, fields: Mapping[str, Any]) -> int:
    """How many prompts the engine gets."""
    if path == "/v1/completions":
        return max(1, _inputs(fields.get("prompt")) + _inputs(fields.get("prompt_embeds")))
    if path == "/v1/chat/completions/batch":
        messages = fields.get("messages")
        return max(1, len(messages)) if isinstance(messages, list) else 1
    return 1


def _batch(fields: Mapping[str, Any]) -> int:
    """Inputs of a pooling request: texts, token lists or conversations; pairs for scores."""
    inputs = max(_inputs(fields.get("input")), _conversations(fields.get("messages")), 1)
    return max(inputs, *(_inputs(fields.get(name)) for name in _PAIRS))


def _inputs(value: Any) -> int:
    """One text or one list of token ids counts once, a list of either as many as it holds."""
    if value is None:
        return 0
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _conversations(value: Any) -> int:
    return len(value) if isinstance(value, list) and value and isinstance(value[0], list) else 0


def _prompt_logprobs(path: str, fields: Mapping[str, Any]) -> int:
    """Alternatives for each prompt token; `echo` asks for those that `logprobs` asks of the answer."""
    own = _whole(fields, "prompt_logprobs", None)
    if own is not None:
        # With 0 there is the token's own log-probability, which costs as much.
        return own if own else 1
    if not fields.get("echo"):
        return 0
    echoed = _whole(fields, "logprobs" if path == "/v1/completions" else "top_logprobs", None)
    return 0 if echoed is None else echoed or 1


def _whole(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """A whole number; vLLM would take "400" and 400.0 for one."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, int):
        return int(value)
    raise BadRequest(f"{name} takes a whole number, not {shown(value, 40)}", param=name)
