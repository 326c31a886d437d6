"""The text of a request's prompt and back, for as long as it is looked at: by the model's own tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from serve.models.decoding import Decoder

log = logging.getLogger(__name__)

# Tokens at the end of a prompt that are read: the question stands there, behind system prompt and examples.
TAIL = 128


class RequestText:
    """Over the tokenizer.json of a checkpoint folder, read with the first prompt; no text where there is none."""

    def __init__(self, model: Path) -> None:
        self._file = model / "tokenizer.json"
        self._decoder: Decoder | None = None
        self._looked = False

    def last(self, tokens: Sequence[int], count: int = TAIL) -> str:
        """The text of the last `count` tokens, without special ones."""
        decoder = self._known()
        return decoder(tokens[-count:]) if decoder is not None else ""

    def tokens(self, text: str) -> list[int] | None:
        """The tokens of a text as it stands in a prompt; None where no tokenizer is known."""
        decoder = self._known()
        return decoder.tokens(text) if decoder is not None else None

    @property
    def special(self) -> frozenset[int]:
        """Tokens that stand between the parts of a prompt."""
        decoder = self._known()
        return decoder.special if decoder is not None else frozenset()

    def _known(self) -> Decoder | None:
        if not self._looked:
            self._looked, self._decoder = True, self._read()
        return self._decoder

    def _read(self) -> Decoder | None:
        if not self._file.exists():
            return None
        try:
            return Decoder(self._file)
        except Exception as error:  # the library raises Exception itself: drift is watched without words then
            log.warning("%s cannot be read, so drift reports name neither language nor words: %s", self._file, error)
            return None
