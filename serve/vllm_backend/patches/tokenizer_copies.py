"""Copies of a tokenizer, one for each thread of vLLM's server, that share its vocabulary and merges.

A deep copy writes all of it as JSON and reads that again: a second for a large vocabulary, and tens of megabytes. What
threads must not share is only what a call sets, as truncation.
"""

from __future__ import annotations

import copy
from types import FunctionType, SimpleNamespace
from typing import Any

# Entries of what no call changes: a vocabulary or merges, which some classes keep beside the library's own.
LARGE = 4096
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def make_thread_pool(original: FunctionType, tokenizer: Any, copies: int = 1) -> Any:
    if not hasattr(tokenizer, "_tokenizer"):
        return original(tokenizer, copies)
    # The same function with these for the module `copy`, then and whenever its pool is empty.
    names = {**original.__globals__, "copy": SimpleNamespace(copy=_same, deepcopy=shared_copy)}
    sharing = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    return sharing(tokenizer, copies)


def _same(tokenizer: Any) -> Any:
    """Another object of the same class and contents; `copy` would look up a whole vocabulary anew."""
    made = object.__new__(type(tokenizer))
    made.__dict__ = dict(vars(tokenizer))
    return made


def shared_copy(tokenizer: Any) -> Any:
    """A copy of a transformers' fast tokenizer; a deep one where it has something that is not known."""
    inner = _shared(tokenizer._tokenizer)
    if inner is None:
        return copy.deepcopy(tokenizer)
    made = _same(tokenizer)
    made.__dict__ = {name: _own(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
    made.__dict__["_tokenizer"] = inner
    return made


def _own(value: Any) -> Any:
    """A deep copy, but for what is large."""
    if isinstance(value, dict | list | tuple) and len(value) >= LARGE:
        return value
    if type(value) is dict:
        return {name: _own(part) for name, part in value.items()}
    return copy.deepcopy(value)


def _shared(tokenizer: Any) -> Any:
    made = type(tokenizer)(tokenizer.model)
    for part in _PARTS:
        if (value := getattr(tokenizer, part)) is not None:
            setattr(made, part, value)
    added = tokenizer.get_added_tokens_decoder()
    made.add_tokens([token for _, token in sorted(added.items())])
    made.encode_special_tokens = tokenizer.encode_special_tokens
    if tokenizer.truncation:
        made.enable_truncation(**tokenizer.truncation)
    if tokenizer.padding:
        made.enable_padding(**tokenizer.padding)
    known = {number: repr(token) for number, token in made.get_added_tokens_decoder().items()}
    return made if known == {number: repr(token) for number, token in added.items()} else None
