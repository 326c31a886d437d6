"""Regular expressions from outside: checked before they are compiled, and matched within a time limit."""

from __future__ import annotations

import math
import re

import regex

from serve.names import shown

# A product of counted repeats above this is refused, as is a count of more digits.
MAX_REPEATS, MAX_DIGITS = 10_000, 4


def pattern_problem(pattern: str) -> str:
    """What is wrong with a pattern, for a sentence that ends with it; "" if it can be used."""
    # Counted repeats are compiled by unrolling: three nested ones of 999 ask for the whole memory.
    counts = re.findall(r"\d+", "".join(re.findall(r"\{[^}]*\}", pattern)))
    if (
        any(len(count) > MAX_DIGITS for count in counts)
        or math.prod(max(int(count), 1) for count in counts) > MAX_REPEATS
    ):
        return f"a pattern with too many counted repeats: `{shown(pattern)}`"
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError, TypeError, IndexError) as wrong:
        return f"`{shown(pattern)}`, which is no regular expression: {shown(wrong)}"
    return ""


def occurs(pattern: str, text: str, seconds: float) -> bool:
    """Whether the pattern matches somewhere in the text; TimeoutError after so many seconds.

    `regex` looks at the clock while it matches, and other threads run meanwhile.
    """
    try:
        return regex.search(pattern, text, timeout=max(seconds, 0.001)) is not None
    except (RecursionError, MemoryError) as large:
        raise TimeoutError("the pattern takes too much to match") from large
