"""What a request says that was not said before: the last message of its user's, without all that stands around it.

    turn = last_turn(exchange.question, generation.prompt, text)
    turn.tokens, turn.position, turn.repeats

A chat sends everything that was said before with each request, an agent the results of its tools, and a client may cut
the history off somewhere. The last message of the user's is the same in all of them. Where a request has no messages
(a prompt that the client rendered, or a body that is too long to be kept), its last turn is what stands between the
special tokens of its template.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.asgi.messages import messages_of
from serve.drift.features.shared_ends import NUMBER, RUN, hashed_runs

# Characters at either end of a longer message that are looked at, and words of a system prompt.
MOST_CHARACTERS, MOST_WORDS = 16_384, 1024
# System prompts whose runs are remembered.
MOST_SYSTEMS = 64
_known_runs: dict[bytes, NDArray[np.uint64]] = {}
_SYSTEMS = ("system", "developer")


class Tokens(Protocol):
    """Of the model's tokenizer, as far as it is known."""

    def tokens(self, text: str) -> list[int] | None: ...
    @property
    def special(self) -> frozenset[int]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """tokens: (n,) of the last message, or of the whole prompt where nothing else is known. position: messages of the
    user's before it. repeats: an earlier request asked it already. said, before: digests of this message and of the
    user's message before it, b"" where there is none. system: (runs,) of the system prompt's words, None where it
    cannot be told from the rest."""

    tokens: NDArray[np.int64]
    position: int = 0
    repeats: bool = False
    said: bytes = b""
    before: bytes = b""
    system: NDArray[np.uint64] | None = None

    @property
    def follows(self) -> bool:
        """It goes on with a conversation."""
        return self.position > 0


def last_turn(question: Mapping[str, Any] | None, prompt: Sequence[int], text: Tokens | None) -> Turn:
    """Of the body of a request, if it was kept, and its rendered prompt."""
    if text is None:
        return Turn(np.array(prompt, np.int64))
    messages = messages_of(question)
    said = [content for role, content in messages if role == "user"]
    tokens = text.tokens(_ends(said[-1])) if said else None
    if tokens is None:
        return Turn(_between_special(np.array(prompt, np.int64), text.special))
    return Turn(
        np.array(tokens, np.int64),
        len(said) - 1,
        messages[-1][0] != "user",
        _digest(said[-1]),
        _digest(said[-2]) if len(said) > 1 else b"",
        _system_runs("\n".join(content for role, content in messages if role in _SYSTEMS)),
    )


def _between_special(tokens: NDArray[np.int64], special: frozenset[int]) -> NDArray[np.int64]:
    """The last turn of a rendered prompt: what follows the token that opens a turn, as the answer's own opens it; or
    what stands before the last special token, if that is where the answer begins. All of it where there are none."""
    at = [place for place, token in enumerate(tokens.tolist()) if token in special] if special else []
    if not at:
        return tokens
    if at[-1] == len(tokens) - 1:
        begin, end = (at[-2] if len(at) > 1 else -1), at[-1]
    else:
        opened = [place for place in at[:-1] if tokens[place] == tokens[at[-1]]]
        if not opened:
            return tokens
        begin = opened[-1]
        end = at[at.index(begin) + 1]
    turn = tokens[begin + 1 : end]
    return turn if len(turn) else tokens


def _ends(text: str) -> str:
    return text if len(text) <= 2 * MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}\n{text[-MOST_CHARACTERS:]}"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _system_runs(text: str) -> NDArray[np.uint64]:
    """The runs of words of a system prompt, which comes with many requests. Remembered by its digest."""
    runs = _known_runs.get(digest := hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
    if runs is None:
        if len(_known_runs) >= MOST_SYSTEMS:
            _known_runs.clear()
        runs = _known_runs[digest] = _word_runs(text)
        runs.setflags(write=False)
    return runs


def _word_runs(text: str) -> NDArray[np.uint64]:
    """The runs of RUN words of a text: the same over restarts, and whatever its numbers are."""
    words = text.split(maxsplit=MOST_WORDS)[:MOST_WORDS]
    symbols = [NUMBER if _has_digit(word) else zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
    # A short one is a run as well.
    padded = symbols + [NUMBER] * (RUN - len(symbols)) if symbols else []
    return np.unique(hashed_runs(np.array(padded, np.int64), RUN))


def _has_digit(word: str) -> bool:
    return not word.isalpha() and any(map(str.isdigit, word))
