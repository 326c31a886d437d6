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
_LETTER, _WORD = re.compile(r"[^\W\d_]"), re.compile(r"[A-Za-z0-9+/=_]{4,}")
_VOWEL = re.compile(r"[aeiouy]", re.IGNORECASE)
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5}|[A-Za-z][0-9][A-Za-z]|[a-z][A-Z][a-z]*[A-Z]")
# UTF-8 that was read as Latin-1 or Windows-1252, and what stands for what could not be read.
_DAMAGE = re.compile(
    r"\ufffd|\u00c3[\u0080-\u00bf\u0192\u2013-\u2122]|\u00e2\u20ac|\u00c2[\u0080-\u00bf]|&#?\w{2,6};.*&#?\w{2,6};"
)
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


def marks_of(text: str) -> tuple[str, ...]:
    """Those of SAID that a text has."""
    letters = "".join(_LETTER.findall(text))
    found = []
    if len(letters) >= LETTERS and letters.lower() != letters.upper():
        capitals = sum(map(str.isupper, letters))
        found += [LOWER] if not capitals else [UPPER] if capitals > CAPITALS * len(letters) else []
    if _DAMAGE.search(text):
        found.append(DAMAGED)
    words = _WORD.findall(text) if text.isascii() else []
    if words and sum(map(_is_none, words)) > SHARE * len(words):
        found.append(NO_WORDS)
    if _JAILBREAK.search(text):
        found.append(JAILBREAK)
    return tuple(found)


def _is_none(word: str) -> bool:
    return len(word) > LONG or not _VOWEL.search(word) or _CONSONANTS.search(word) is not None
