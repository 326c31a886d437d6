"""Who answers a share of a name's requests: an asker always meets the same version, and the shares come out exact.

Pure arithmetic. A point in [0, 1) below the weight goes to the candidate, so that a growing weight only ever adds
askers to it and never sends one back.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import msgspec

_encode = msgspec.json.Encoder(order="deterministic").encode
# The fractional part of the golden ratio: its multiples fill [0, 1) as evenly as any sequence does.
_GOLDEN = 0.6180339887498949


def sticky_key(fields: Mapping[str, Any], tenant: str, key: str) -> bytes | None:
    """What stays the same from request to request of one asker: their `user`, else the key and how the talk began.

    `key` is the API key's id. Users of one name in two tenants are two askers.
    """
    for name in ("user", "safety_identifier"):
        user = fields.get(name)
        if isinstance(user, str) and user:
            return f"{tenant}\0user\0{user}".encode("utf-8", "surrogatepass")
    begin = _beginning(fields)
    return None if begin is None else f"{tenant}\0talk\0{key}\0".encode() + _encode(begin)


def _beginning(fields: Mapping[str, Any]) -> Any:
    """The first thing that the user said, or the prompt."""
    talk = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if not isinstance(talk, list):
        return talk or None
    for message in talk:
        if isinstance(message, dict) and message.get("role") == "user":
            return message.get("content")
    return talk[0] if talk else None


def point(name: str, version: int, key: bytes) -> float:
    """Where an asker stands in [0, 1), for one candidate; for the next candidate, elsewhere."""
    digest = hashlib.blake2b(f"{name}@v{version}\0".encode() + key, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


class Shares:
    """Deals requests out, by asker or, where nobody can be told apart, in turn."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, int, str], itertools.count[int]] = {}

    def takes(self, name: str, version: int, weight: float, key: bytes | None, kind: str = "canary") -> bool:
        """Whether this request belongs to the share of `version`."""
        if key is not None:
            return point(name, version, key) < weight
        turn = next(self._turns.setdefault((name, version, kind), itertools.count(1)))
        return turn * _GOLDEN % 1.0 < weight
