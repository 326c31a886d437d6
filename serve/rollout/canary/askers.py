"""Who asks, and which conversation a request belongs to, as far as the request says.

A conversation is known by its first message of the user's: that stays while the conversation grows, on every server and
after a restart. Few-shot chats have their first messages in common with all others of their kind, so there the first
message that comes after the shared opening counts. An opening is shared if different messages followed it, and nobody
ever sent it as a whole request: a popular first question is sent as it is, examples are not.

Only digests are kept, and of long texts only both ends are read: it all happens on the event loop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

# Characters at either end of a text, token ids at either end of a prompt, and elements at either end of another list.
TEXT_END = 2048
IDS_END = 512
LIST_END = 32
# Messages of the user's that are looked at, from the first one on.
MESSAGES = 64
# Openings of conversations, and stored responses, that are remembered.
OPENINGS, RESPONSES = 20_000, 10_000
# Of a user's name as it stands; a longer one by its digest.
NAME_BYTES = 200
_PROMPTS = ("messages", "input", "prompt", "token_ids")
DEPTH = 6


@dataclass(frozen=True, slots=True)
class Asker:
    """`key` is the same for all requests of one asker, `conversation` for those of one conversation; None: not known.

    `begins`: nothing came before this request in its conversation.
    """

    key: bytes | None
    conversation: bytes | None = None
    begins: bool = True


@dataclass(slots=True)
class _Opening:
    """What followed the first messages of a conversation."""

    following: bytes | None = None
    branches: bool = False
    is_whole: bool = False

    @property
    def is_shared(self) -> bool:
        return self.branches and not self.is_whole


class Askers:
    """Tells askers and conversations apart. For one event loop."""

    def __init__(self) -> None:
        self._openings: OrderedDict[bytes, _Opening] = OrderedDict()
        self._responses: OrderedDict[str, Asker] = OrderedDict()

    def of(self, fields: Mapping[str, Any], tenant: str, key: str) -> Asker:
        """Who sent `fields`: the request's user, else its conversation. `key` is the API key's id.

        Users of one name in two tenants are two askers.
        """
        previous = fields.get("previous_response_id")
        if isinstance(previous, str) and (answered := self._responses.get(previous)):
            return replace(answered, begins=False)
        scope = f"{tenant}\0talk\0{key}\0".encode("utf-8", "surrogatepass")
        conversation, begins = self._conversation(scope, fields)
        user = _user(fields)
        if user is None:
            return Asker(conversation, conversation, begins)
        named = f"{tenant}\0user\0{user}".encode("utf-8", "surrogatepass")
        if len(named) > NAME_BYTES:
            named = _digest(named)
        # Two users may begin a conversation with the same words.
        return Asker(named, None if conversation is None else _digest(named + conversation), begins)

    def remember(self, response_id: str, asker: Asker) -> None:
        """A stored response that a later request may name as the one before."""
        self._responses[response_id] = asker
        if len(self._responses) > RESPONSES:
            self._responses.popitem(last=False)

    def _conversation(self, scope: bytes, fields: Mapping[str, Any]) -> tuple[bytes | None, bool]:
        """Its digest, and whether it begins with this request."""
        messages = next((fields[name] for name in _PROMPTS if fields.get(name)), None)
        if not messages:
            return None, True
        parts = list(_said(messages)) if isinstance(messages, list) else []
        if not parts:
            return _digest(scope, *_parts(messages)), True
        digests = _prefixes(scope, parts)
        begins_at = 0
        for at, (opening, following) in enumerate(pairwise(digests), 1):
            if self._followed(opening, following).is_shared:
                begins_at = at
        self._opening(digests[-1]).is_whole = True
        return digests[begins_at], begins_at == len(digests) - 1

    def _followed(self, digest: bytes, following: bytes) -> _Opening:
        opening = self._opening(digest)
        if opening.following is None:
            opening.following = following
        opening.branches = opening.branches or opening.following != following
        return opening

    def _opening(self, digest: bytes) -> _Opening:
        opening = self._openings.setdefault(digest, _Opening())
        self._openings.move_to_end(digest)
        if len(self._openings) > OPENINGS:
            self._openings.popitem(last=False)
        return opening


def _user(fields: Mapping[str, Any]) -> str | None:
    """The user's name, by any field of the APIs that are spoken here."""
    metadata = fields.get("metadata")
    anthropic = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    for user in (fields.get("user"), fields.get("safety_identifier"), anthropic):
        if isinstance(user, str) and user:
            return user
    return None


def _said(messages: Sequence[Any]) -> Iterator[Any]:
    """The contents of the first messages of the user's; systems and answers are left out, since clients edit those."""
    count = 0
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            yield message.get("content")
            count += 1
            if count == MESSAGES:
                return


def _prefixes(scope: bytes, contents: Sequence[Any]) -> list[bytes]:
    """The digest of the first content, of the first two, and so on."""
    running = hashlib.blake2b(scope, digest_size=16)
    digests = []
    for content in contents:
        for part in _parts(content):
            running.update(part)
        digests.append(running.copy().digest())
    return digests


def _digest(*parts: bytes) -> bytes:
    running = hashlib.blake2b(digest_size=16)
    for part in parts:
        running.update(part)
    return running.digest()


def _parts(value: Any, depth: int = 0) -> Iterator[bytes]:
    """What is digested of a JSON value: all of a short one, both ends and the length of a long one."""
    if isinstance(value, str):
        yield f"s{len(value)}:".encode()
        ends = value if len(value) <= 2 * TEXT_END else value[:TEXT_END] + value[-TEXT_END:]
        yield ends.encode("utf-8", "surrogatepass")
    elif isinstance(value, list) and depth < DEPTH:
        yield f"l{len(value)}:".encode()
        of_numbers = bool(value) and type(value[0]) is int
        end = LIST_END if not of_numbers else IDS_END if depth == 0 else IDS_END // 8
        for element in value if len(value) <= 2 * end else value[:end] + value[-end:]:
            yield from _parts(element, depth + 1)
    elif isinstance(value, Mapping) and depth < DEPTH:
        yield f"m{len(value)}:".encode()
        for name in sorted(value)[:LIST_END]:
            yield from _parts(name, depth + 1)
            yield from _parts(value[name], depth + 1)
    elif isinstance(value, list | Mapping):
        yield f"c{len(value)}".encode()
    elif isinstance(value, int):
        yield f"i{value:x},"[:64].encode()  # hexadecimal has no limit of digits
    else:
        yield f"o{value!r}"[:64].encode()
