"""Each grammar is compiled by the library that it was checked by.

vLLM checks a schema that xgrammar does not know all of with llguidance, and then compiles it with whatever library the
engine's first grammar was for: xgrammar left out what it does not know, and the answer followed another schema. Masks
of all libraries have one form, a bit for each word. And of schemas that xgrammar takes for others, without a word to
the client, llguidance gets those that it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

# What is said of a value beside what it is. Beside one of ELSEWHERE, or where nothing of TYPED says what it is,
# xgrammar does not look at it.
SAID = frozenset((
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "required", "properties", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
))  # fmt: skip
ELSEWHERE = frozenset(("$ref", "anyOf", "allOf", "enum", "const"))
TYPED = frozenset(("type", "properties", "additionalProperties", "items", "prefixItems"))


def grammar_init(original: Callable[..., None], manager: Any, request: Any) -> None:
    """vLLM's, with a backend for each library that a request of this engine was for. A thread goes on with the copy."""
    if request.structured_output_request is None:
        return
    backends: dict[str, Any] = manager.__dict__.setdefault("grammar_backends", {})
    name = request.sampling_params.structured_outputs._backend
    own = copy(manager)
    own.backend = backends.get(name)
    own.backend_name = name if name in backends else None  # vLLM 0.33 refuses another library than the first
    original(own, request)
    manager.backend = backends[name] = own.backend


def is_beyond_xgrammar(schema: Any) -> bool:
    """Whether xgrammar takes the JSON schema for one that says less, as far as llguidance may know better."""
    ahead = [schema]
    while ahead:
        value = ahead.pop()
        if isinstance(value, dict):
            here = value.keys()
            several = isinstance(value.get("allOf"), list) and len(value["allOf"]) > 1
            if several or (here & SAID and (not here & TYPED or here & ELSEWHERE)):
                return True
        ahead += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return False
