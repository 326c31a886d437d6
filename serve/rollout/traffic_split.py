"""Which version answers a request while a name's traffic is split: the same asker always gets the same version.

Pure arithmetic: an asker is a point in [0, 1), and points below the weight go to the candidate. A growing weight only
adds askers to it and never takes one away. Requests without an asker are dealt in turn, so that shares come out exact.
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
    """What identifies an asker: the request's `user`, else the API key and how the conversation began.

    `key` is the API key's id. Users of one name in two tenants are two askers.
    """
    for name in ("user", "safety_identifier"):
        user = fields.get(name)
        if isinstance(user, str) and user:
            return f"{tenant}\0user\0{user}".encode("utf-8", "surrogatepass")
    beginning = _beginning(fields)
    return None if beginning is None else f"{tenant}\0talk\0{key}\0".encode() + _encode(beginning)


def _beginning(fields: Mapping[str, Any]) -> Any:
    """The first thing that the user said, or the prompt."""
    messages = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if not isinstance(messages, list):
        return messages or None
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "user":
            return message.get("content")
    return messages[0] if messages else None


def point(name: str, version: int, key: bytes) -> float:
    """An asker's point in [0, 1) for this candidate; for another candidate it is another point."""
    digest = hashlib.blake2b(f"{name}@v{version}\0".encode() + key, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


class Shares:
    """Deals requests out: by asker, or in turn where the asker is unknown."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, int, str], itertools.count[int]] = {}

    def takes(self, name: str, version: int, weight: float, key: bytes | None, kind: str = "canary") -> bool:
        """Whether this request belongs to the share of `version`."""
        if key is not None:
            return point(name, version, key) < weight
        turn = next(self._turns.setdefault((name, version, kind), itertools.count(1)))
        return turn * _GOLDEN % 1.0 < weight
