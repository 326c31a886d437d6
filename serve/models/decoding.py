"""The text of tokens and back, by a checkpoint's tokenizer.json; decoded some times quicker than by the library where
tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The characters that stand for bytes in the vocabularies of byte-level tokenizers, as in GPT-2's.
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_BYTES = {chr(byte): byte for byte in _SHOWN} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}


class Decoder:
    """Of a tokenizer.json; raises what the library raises, Exception itself, where it cannot be read."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.decoders import ByteLevel

        self._tokenizer = Tokenizer.from_file(str(file))
        self._of_bytes = isinstance(self._tokenizer.decoder, ByteLevel)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)
        self._all, self._plain = _Pieces(self._tokenizer, frozenset()), _Pieces(self._tokenizer, self.special)

    def __call__(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """special: with the text of special tokens."""
        if not self._of_bytes:
            text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=not special)
            return text
        pieces = self._all if special else self._plain
        return b"".join(map(pieces.__getitem__, tokens)).decode(errors="replace")

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text that stands by itself, without what the tokenizer puts around a whole prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class _Pieces(dict[int, bytes]):
    """The bytes of each token, once it came; a text is all of them in a row. Nothing of a special token."""

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        self._tokenizer, self._special = tokenizer, special

    def __missing__(self, token: int) -> bytes:
        name = "" if token in self._special else self._tokenizer.id_to_token(token) or ""
        known = [_BYTES.get(character, -1) for character in name]
        # A token that was added by hand is written as it is.
        self[token] = piece = name.encode() if -1 in known else bytes(known)
        return piece
