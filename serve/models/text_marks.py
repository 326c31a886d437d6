"""What stands out in how a text is written, whatever it is about: casing, damage, no words, jailbreak phrases."""

from __future__ import annotations

import re

LOWER, UPPER = "lower", "upper"
DAMAGED, NO_WORDS = "damaged", "no_words"
JAILBREAK = "jailbreak"
# What is said of prompts of which more have a mark.
SAID = {
    LOWER: "all in lower case",
    UPPER: "in capitals",
    DAMAGED: "with a damaged encoding",
    NO_WORDS: "of no words",
    JAILBREAK: "with phrases that jailbreaks use",
}
# Letters, at least, of a text whose casing says something, and the share of them that is in capitals.
LETTERS, CAPITALS = 20, 0.8
# Letters of the longest word; and the share of the words that are none.
LONG, SHARE = 25, 0.4
_LETTER = re.compile(r"[^\W\d_]")
# A number is no word, and none that is missing.
_WORD = re.compile(r"(?<![A-Za-z0-9+/=_])(?=[0-9+/=_]*[A-Za-z])[A-Za-z0-9+/=_]{4,}")
_VOWEL = re.compile(r"[aeiouy]", re.IGNORECASE)
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5}|[A-Za-z][0-9][A-Za-z]|[a-z][A-Z][a-z]*[A-Z]")
# UTF-8 that was read as Latin-1 or Windows-1252, and what stands for what could not be read.
_DAMAGE = re.compile(
    r"\ufffd|\u00c3[\u0080-\u00bf\u0192\u2013-\u2122]|\u00e2\u20ac|\u00c2[\u0080-\u00bf]|&#?\w{2,6};.*&#?\w{2,6};"
)
# Without any of them a text in ASCII has no word that is none.
_MAY_BE_NONE = re.compile(
    r"(?<![A-Za-z0-9+/=_])[B-DF-HJ-NP-TV-XZb-df-hj-np-tv-xz0-9+/=_]{4}|[A-Za-z0-9+/=_]{26}"
    r"|[B-DF-HJ-NP-TV-XZb-df-hj-np-tv-xz]{5}|[A-Za-z][0-9][A-Za-z]|[a-z][A-Z][a-z]*[A-Z]"
)
# One of them is in each phrase of `_JAILBREAK`.
_IN_PHRASES = (
    *("ignore ", "disregard ", "forget ", "anything now", "dan", "developer mode", "jailbr", "restriction", "filter"),
    *("guideline", "limit", "evil", "uncensored", "unrestricted", "amoral", "never ", " prompt"),
)
_NOT_LETTERS = bytes(byte for byte in range(256) if not chr(byte).isalpha() or byte > 127)
_CAPITALS = bytes(range(ord("A"), ord("Z") + 1))
_JAILBREAK = re.compile(
    r"ignore (?:all |any |the |your |my )*(?:previous|prior|above|earlier) (?:instruction|prompt|rule|message)"
    r"|(?:disregard|forget) (?:all |any |the |your |every)*(?:previous |prior |above )?(?:instruction|rule|guideline)"
    r"|\bdo anything now\b|\bDAN\b|developer mode|jailbr(?:eak|oken)"
    r"|(?:without|no|free (?:of|from)) (?:any |all |ethical |moral |content )*"
    r"(?:restriction|filter|guideline|limit)\w*s"
    r"|(?:you are|act as|pretend (?:to be|you are)) (?:now )?an? (?:evil|unfiltered|uncensored|unrestricted|amoral)"
    r"|never (?:say|refuse|decline)|(?:system|hidden) prompt",
    re.IGNORECASE,
)  # fmt: skip


def marks_of(text: str, *, rest: bool = False) -> tuple[str, ...]:
    """Those of SAID that a text has. rest: it is what is left of one that others share most of: how that is cased, and
    whether it is more than a name or a number, was nobody's choice."""
    plain = text.isascii()
    letters, capitals = _plain_letters(text) if plain else _letters(text)
    found = []
    if letters >= LETTERS and not rest:
        found += [LOWER] if not capitals else [UPPER] if capitals > CAPITALS * letters else []
    if (not plain or "&" in text) and _DAMAGE.search(text):
        found.append(DAMAGED)
    words = _WORD.findall(text) if plain and not rest and _MAY_BE_NONE.search(text) else []
    if words and sum(map(_is_none, words)) > SHARE * len(words):
        found.append(NO_WORDS)
    # To look for the words first takes a fraction of the time.
    if (not plain or any(map(text.lower().__contains__, _IN_PHRASES))) and _JAILBREAK.search(text):
        found.append(JAILBREAK)
    return tuple(found)


def _plain_letters(text: str) -> tuple[int, int]:
    """How many letters there are in ASCII, and how many of them are capitals."""
    letters = text.encode().translate(None, _NOT_LETTERS)
    return len(letters), len(letters) - len(letters.translate(None, _CAPITALS))


def _letters(text: str) -> tuple[int, int]:
    """The same in any writing; none in one without capitals."""
    letters = "".join(_LETTER.findall(text))
    return (len(letters) if letters.lower() != letters.upper() else 0), sum(map(str.isupper, letters))


def _is_none(word: str) -> bool:
    return len(word) > LONG or not _VOWEL.search(word) or _CONSONANTS.search(word) is not None
