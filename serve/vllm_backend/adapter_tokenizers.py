"""The base's tokenizer with the tokens that an adapter adds: for the prompts of that adapter, and for its answers.

vLLM encodes every prompt with one tokenizer. Which adapter a prompt is for is known by its lease (`leased`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken as Added
from vllm.exceptions import VLLMValidationError
from vllm.tokenizers.hf import maybe_make_thread_pool

from serve.adapters.adapter import CONFIG
from serve.adapters.added_tokens import AddedToken, Tokenizer, added_tokens, check_added
from serve.asgi.exchange import leased
from serve.errors import AdapterRejected
from serve.names import shown
from serve.vllm_backend.patches.tokenizer_copies import shared_copy

# Copies that are used at a time; vLLM makes more where they do not do.
COPIES = 2


class BaseTokens:
    """What an engine's tokenizer knows; `engine` is there once it has started."""

    def __init__(self, engine: Callable[[], Any]) -> None:
        self._engine = engine
        self._control: frozenset[str] | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens the embedding has rows for."""
        return int(self._engine().model_config.get_vocab_size())

    @property
    def control_tokens(self) -> frozenset[str]:
        """What is one token wherever it stands in a text: ends of turns and the like."""
        if self._control is None:
            tokenizer = self._engine().renderer.tokenizer
            self._control = frozenset({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        return self._control

    def token_number(self, token: str) -> int | None:
        number: int | None = self._engine().renderer.tokenizer.get_vocab().get(token)
        return number


class AdapterTokenizers:
    """Of one engine. `renderer` is vLLM's, which from now on encodes a prompt with the tokenizer of its adapter."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer
        self._of: dict[str, Any] = {}
        renderer.get_tokenizer = partial(self._current, renderer.get_tokenizer)
        renderer.get_eos_token_id = partial(self._end, renderer.get_eos_token_id)
        renderer.validate_token_ids = partial(self._validate, renderer.validate_token_ids)
        renderer._tokenize_prompt_async = partial(_in_context, renderer._executor, renderer._tokenize_prompt)
        renderer._async_tokenizer_decode = partial(_in_context, renderer._executor, renderer._decode)

    def add(self, adapter_id: str, folder: Path, base: Tokenizer) -> None:
        """Before the first request for an adapter; AdapterRejected, if its tokens are not what the base would add."""
        tokens = added_tokens(json.loads((folder / CONFIG).read_text()))
        if tokens:
            check_added(folder, base)
            self._of[adapter_id] = with_tokens(self._renderer.tokenizer, tokens)

    def remove(self, adapter_id: str) -> None:
        self._of.pop(adapter_id, None)

    def of(self, adapter_id: str | None) -> Any:
        """An adapter's own; None where it has the base's."""
        return self._of.get(adapter_id) if adapter_id else None

    def _current(self, original: Any) -> Any:
        return self.of(leased.get()) or original()

    def _end(self, original: Any) -> int | None:
        own = self.of(leased.get())
        return original() if own is None else own.eos_token_id

    def _validate(self, original: Any, token_ids: Any, *, parameter: str | None = None) -> None:
        own = self.of(leased.get())
        if own is None or not token_ids:
            original(token_ids, parameter=parameter)
            return
        most = max(own.max_token_id, self._renderer.model_config.get_vocab_size() - 1)
        if wrong := next((token for token in (min(token_ids), max(token_ids)) if not 0 <= token <= most), None):
            raise VLLMValidationError(f"Token id {wrong} is out of vocabulary", parameter=parameter)


def with_tokens(tokenizer: Any, tokens: list[AddedToken]) -> Any:
    """A copy that shares the vocabulary, with these tokens under their numbers; AdapterRejected, if it cannot be."""
    plain = _plain(tokenizer)
    if not hasattr(plain, "_tokenizer"):
        raise AdapterRejected("this base's tokenizer takes no tokens of an adapter: merge it into its base")
    own = shared_copy(plain)
    for token in sorted(tokens, key=lambda token: token.number):
        flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        own.add_tokens([Added(token.content, special=token.special, **flags)], special_tokens=token.special)
        if (number := own.convert_tokens_to_ids(token.content)) != token.number:
            raise AdapterRejected(
                f"its token {shown(token.content)} has the number {token.number}, and this base's tokenizer gives it "
                f"{number}: was it trained on another base?"
            )
        if token.ends:
            own.eos_token = token.content
    return maybe_make_thread_pool(_quick(own, tokenizer, tokens), COPIES)


def _quick(own: Any, base: Any, tokens: list[AddedToken]) -> Any:
    """With what vLLM looks up for each prompt, which transformers would compute anew."""
    most = max(base.max_token_id, *(token.number for token in tokens))
    longest = max(base.max_chars_per_token, *(len(token.content) for token in tokens))
    ids, texts = own.all_special_ids, own.all_special_tokens
    kind = type(own)
    looked_up = {
        "max_token_id": most,
        "max_chars_per_token": longest,
        "all_special_ids": property(lambda _: ids),
        "all_special_tokens": property(lambda _: texts),
        "is_fast": property(lambda _: True),
    }
    own.__class__ = type(f"Adapter{kind.__name__}", (kind,), looked_up)
    return own


def _plain(tokenizer: Any) -> Any:
    """transformers' own, which vLLM wraps in classes that remember and that borrow from a pool."""
    while type(tokenizer).__name__.startswith(("TokenizerPool", "Cached")):
        _, (tokenizer, *_) = tokenizer.__reduce__()
    return tokenizer


async def _in_context(executor: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
    """In one of vLLM's threads, which knows of which adapter the prompt is."""
    run = partial(copy_context().run, call, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(executor, run)
