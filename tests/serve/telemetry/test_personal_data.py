"""Personal data is found by pattern, and numbers that are none are left alone."""

from __future__ import annotations

import time

import pytest

from serve.telemetry.personal_data import KINDS, blacked_out, personal_data


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to anna.b+news@mail.example.org, please", ["email"]),
        ("call +49 221 1234567 tomorrow", ["phone"]),
        ("Tel. 0221/1234567", ["phone"]),
        ("ring (212) 555-0123", ["phone"]),
        ("my account DE89 3704 0044 0532 0130 00 BIC COBADEFF", ["iban"]),
        ("GB82WEST12345698765432", ["iban"]),
        ("pay with 4111 1111 1111 1111", ["credit_card"]),
        ("378282246310005", ["credit_card"]),
        ("mail a@b.de, card 5555-5555-5555-4444", ["email", "credit_card"]),
    ],
)
def test_what_is_personal_is_found(text, kinds):
    assert personal_data(text) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the meeting is on 2026-11-25 at 12:30",
        "version 1.23.456-7890 of 192.168.10.200",
        "@dataclass and user@localhost",
        "4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "DE89 3704 0044 0532 0130 01",
        "pi is 3.14159265358979323846",
        "add 1234567 and 7654321",
        "0.12345678 0.87654321",
        "order 20261125-4711-0815",
    ],
)
def test_other_numbers_and_signs_are_not(text):
    assert personal_data(text) == []


def test_only_what_was_asked_for_is_looked_for():
    text = "a@b.de 4111 1111 1111 1111"
    assert personal_data(text, ["credit_card"]) == ["credit_card"] and personal_data(text, []) == []
    assert set(KINDS) == {"email", "phone", "iban", "credit_card"}


@pytest.mark.parametrize("text", ["1 " * 2000, "a." * 2000 + "@", "@" * 4000, "A1" * 2000, "(0" * 2000, "+1" * 2000])
def test_no_text_takes_long(text):
    began = time.thread_time()
    personal_data(text[:4000])
    assert time.thread_time() - began < 1.0, "a pattern that backtracks would take minutes"


@pytest.mark.parametrize(
    ("text", "left", "kinds"),
    [
        ("mail a.b@example.com, now", "mail [redacted], now", ["email"]),
        ("call +49 221 1234567 or (212) 555-0123.", "call [redacted] or [redacted].", ["phone", "phone"]),
        ("IBAN DE89 3704 0044 0532 0130 00 thanks", "IBAN [redacted] thanks", ["iban"]),
        ("card 4111 1111 1111 1111!", "card [redacted]!", ["credit_card"]),
        ("in 2024 there were 1,234,567 of them @ noon", "in 2024 there were 1,234,567 of them @ noon", []),
        ("", "", []),
    ],
)
def test_what_is_found_is_blacked_out_and_nothing_else(text, left, kinds):
    assert blacked_out(text) == (left, kinds)
    assert personal_data(left) == []
