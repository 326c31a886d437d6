"""Which kinds of personal data a text probably holds, by pattern: counted, or blacked out; never kept.

Patterns find what is written the usual way and miss the rest; a number that only looks like a phone number counts too.
Card numbers are held against Luhn's check digit (ISO/IEC 7812), IBANs against their country's length and their check
digits (ISO 13616).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

KINDS = ("email", "phone", "iban", "credit_card")

# Seven characters or more of digits and what stands between them: everything but an address is looked for there alone.
_NUMBER = re.compile(r"\d[\d ()./-]{5,}\d")
# What may stand before its first digit, and behind its last one: `(+`, a country, letters of an IBAN.
_BEFORE, _BEHIND = 8, 34
# Around an @: no more than the longest name and domain, so that a text of letters costs nothing.
_AT = re.compile("@")
_NAME = re.compile(r"[\w.%+-]{1,64}$", re.ASCII)
_DOMAIN = re.compile(r"(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}\b", re.ASCII | re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w+])(?<!\d )(?:\+|00)[1-9]\d{0,2}(?:[ ()./-]{0,2}\d){6,13}(?!\d)"  # +49 221 1234567
    r"|(?<![\w.,-])(?<!\d )\(?0[1-9]\d{1,4}\)?[ /-]{1,2}\d{2,8}(?:[ -]\d{2,8}){0,4}(?![\d.-])"  # 0221/1234567
    r"|(?<![\w.-])(?<!\d )\(?[2-9]\d{2}\)?[ .-]\d{3}[.-]\d{4}(?![\d-])"  # (212) 555-0123
)
_IBAN = re.compile(r"\b([A-Z]{2})\d{2}(?: ?[A-Z0-9]){11,30}")
_IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24, "FI": 18,
    "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "TR": 26, "UA": 29,
}  # fmt: skip
_CARD = re.compile(r"(?<![\d-])(?<!\d )[2-6]\d{3}(?:[ -]?\d){9,15}(?![\d-])(?! \d)")


def personal_data(text: str, kinds: Collection[str] = KINDS) -> list[str]:
    """Those of `kinds` that the text holds at least once."""
    held = {"email": _emails(text)} if "@" in text else {}
    if numbers := _places(text):
        held |= {"phone": _phones(text, numbers), "iban": _ibans(text, numbers), "credit_card": _cards(text, numbers)}
    return [kind for kind in KINDS if kind in kinds and kind in held and any(held[kind])]


def blacked_out(text: str, mark: str = "[redacted]") -> tuple[str, list[str]]:
    """The text with `mark` in the place of each, and the kinds of all that were there."""
    numbers = _places(text)
    # Of two that overlap the longer one counts: a card's number may look like a phone's.
    found = [
        (start, -end, kind)
        for kind, places in (
            ("email", _emails(text)),
            ("iban", _ibans(text, numbers)),
            ("credit_card", _cards(text, numbers)),
            ("phone", _phones(text, numbers)),
        )
        for start, end in places
    ]
    pieces = []
    kinds = []
    at = 0
    for start, minus_end, kind in sorted(found):
        if -minus_end <= at:
            continue
        pieces += [text[at:start], mark] if start >= at else []
        at = -minus_end
        kinds.append(kind)
    return "".join([*pieces, text[at:]]), kinds


def _places(text: str) -> list[tuple[int, int]]:
    """Where numbers are, with what may belong to them; places that overlap are one."""
    places: list[tuple[int, int]] = []
    for match in _NUMBER.finditer(text):
        start, end = max(0, match.start() - _BEFORE), match.end() + _BEHIND
        if places and start < places[-1][1]:
            start = places.pop()[0]
        places.append((start, end))
    return places


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for at in _AT.finditer(text):
        domain = _DOMAIN.match(text, at.end())
        before = max(0, at.start() - 64)
        if domain and (name := _NAME.search(text[before : at.start()])):
            yield before + name.start(), domain.end()


def _phones(text: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Phone numbers that are not a card's."""
    for start, end in places:
        yield from (match.span() for match in _PHONE.finditer(text, start, end) if not _CARD.fullmatch(match[0]))


def _ibans(text: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in places:
        for match in _IBAN.finditer(text, start, end):
            if _is_iban(match[0], match[1]):
                yield match.start(), match.start() + _length(match[0], _IBAN_LENGTHS[match[1]])


def _cards(text: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in places:
        yield from (match.span() for match in _CARD.finditer(text, start, end) if _is_card(match[0]))


def _length(text: str, signs: int) -> int:
    """Characters up to the end of so many that are no spaces."""
    return [at for at, sign in enumerate(text, 1) if sign != " "][signs - 1]


def _is_iban(text: str, country: str) -> bool:
    plain = text.replace(" ", "")[: _IBAN_LENGTHS.get(country, 0)]
    if len(plain) < 15 or len(plain) != _IBAN_LENGTHS[country]:
        return False
    return int("".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])) % 97 == 1


def _is_card(text: str) -> bool:
    digits = [int(letter) for letter in text if letter.isdigit()]
    if len(set(digits)) == 1:
        return False
    doubled = [2 * digit for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(digit // 10 + digit % 10 for digit in doubled)) % 10 == 0
