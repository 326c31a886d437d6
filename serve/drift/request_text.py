"""The text of a request's prompt, for as long as it is looked at: decoded by the model's own tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Tokens at the end of a prompt that are read: the question stands there, behind system prompt and examples.
TAIL = 128


class RequestText:
    """Over the tokenizer.json of a checkpoint folder, read with the first prompt; no text where there is none."""

    def __init__(self, model: Path) -> None:
        self._file = model / "tokenizer.json"
        self._tokenizer: Any = None

    def last(self, tokens: Sequence[int], count: int = TAIL) -> str:
        """The text of the last `count` tokens, without special ones."""
        return self._decode(list(tokens[-count:]))

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            self._tokenizer = self._read() or False
        text: str = self._tokenizer.decode(tokens) if self._tokenizer else ""
        return text

    def _read(self) -> Any:
        if not self._file.exists():
            return None
        try:
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library raises Exception itself: drift is watched without words then
            log.warning("%s cannot be read, so drift reports name neither language nor words: %s", self._file, error)
            return None
