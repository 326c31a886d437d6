"""The text of a sequence's tokens, of nearly all of them by a look into a table.

vLLM has the tokenizers library decode the last tokens anew for each token. Where tokens are strings of bytes, as in
Llama 3, Qwen, Mistral and DeepSeek, that is the text before and the token's own text, as long as every character is
whole. A token that is a part of a character goes the library's way, and so does what follows until the text is whole
again.
"""

from __future__ import annotations

from typing import Any

from tokenizers import decoders
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

# What stands for bytes that are no character, or not yet.
REPLACEMENT = "\ufffd"


class TokenTexts(dict[int, str | None]):
    """The text of each token on its own, as it is asked for; None where that is not whole. Special tokens have none."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str | None:
        try:
            text: str | None = self._tokenizer.decode([token], skip_special_tokens=True)
        except (OverflowError, TypeError):  # no token: vLLM's way says so in the log
            return None
        if REPLACEMENT in (text or ""):
            text = None
        self[token] = text
        return text

    @classmethod
    def of(cls, tokenizer: Any) -> TokenTexts | None:
        """The table of a transformers tokenizer; None where a token's text depends on its neighbours."""
        backend = getattr(tokenizer, "_tokenizer", None)
        return cls(backend) if isinstance(getattr(backend, "decoder", None), decoders.ByteLevel) else None


class TableDetokenizer(FastIncrementalDetokenizer):
    """vLLM's, with a table. `whole`: every character so far is there, and was told."""

    texts: TokenTexts
    whole: bool
    _last_output_text_offset: int

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        if not self.whole or stop_terminated or self.stop:
            return super().update(new_token_ids, stop_terminated)
        for token in new_token_ids:
            self.token_ids.append(token)
            self.output_text += (self.whole and self.texts[token]) or self.decode_next(token)
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        if not delta or self.stop:
            return super().get_next_output_text(finished, delta)
        begin, self._last_output_text_offset = self._last_output_text_offset, len(self.output_text)
        return self.output_text[begin:]

    def decode_next(self, next_token_id: int) -> str:
        if self.whole:
            text = self.texts[next_token_id]
            if text is not None:
                return text
            self.stream = decoders.DecodeStream(skip_special_tokens=True)
        text = self._protected_step(next_token_id)
        self.whole = bool(text)
        return text or ""


def look_up(detokenizer: Any, texts: TokenTexts) -> None:
    """Have a new sequence's detokenizer use the table, if it decodes as the table does."""
    if type(detokenizer) is FastIncrementalDetokenizer and detokenizer.skip_special_tokens:
        detokenizer.__class__ = TableDetokenizer
        table: Any = detokenizer
        table.texts = texts
        table.whole = False  # the prompt may end within a character
