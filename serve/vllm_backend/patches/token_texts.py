"""The text of single tokens, worked out once a token.

Log-probabilities ask for the text of each token that they name, those of a long prompt for tens of thousands at once,
and vLLM decodes each of them anew on the event loop: no other answer goes on for a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

# At most a vocabulary for each tokenizer, as long as that lives.
_TEXTS: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


def convert_ids_list_to_tokens(original: Callable[..., list[str]], tokenizer: Any, token_ids: list[int]) -> list[str]:
    texts = _TEXTS.setdefault(tokenizer, {})
    if missing := [token for token in dict.fromkeys(token_ids) if token not in texts]:
        texts.update(zip(missing, original(tokenizer, missing), strict=True))
    return [texts[token] for token in token_ids]
