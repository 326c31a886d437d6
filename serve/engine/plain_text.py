"""Texts that are quoted to a model that judges them: none of them can end the judge's own turn or begin another one."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache


def quoted(text: str, special: Collection[str]) -> str:
    """The text, in which none of these tokens is one any more: a space stands behind its first character."""
    pattern = _pattern(frozenset(special))
    while pattern and pattern.search(text):
        text = pattern.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)
    return text


@lru_cache(maxsize=16)
def _pattern(special: frozenset[str]) -> re.Pattern[str] | None:
    # One that holds a space could be made by one: those are few, and are left as they are.
    names = [name for name in special if len(name) > 1 and " " not in name]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None
