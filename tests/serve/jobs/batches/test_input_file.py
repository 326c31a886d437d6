"""What a batch's input may be, and how what is wrong with it is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from serve.jobs.batches.input_file import MAX_ERRORS, check, requests
from serve.jobs.batches.objects import Limits
from tests.serve.jobs.batches.conftest import lines_of, request
from tests.support.app import CHAT

SMALL = replace(Limits(), lines=5, line_bytes=500)


@pytest.fixture
def write(tmp_path):
    def written(*rows, data=None):
        path = tmp_path / "in.jsonl"
        path.write_bytes(lines_of(list(rows)) if data is None else data)
        return path

    return written


def test_lines_are_counted_and_read_in_order_without_those_that_were_answered(write):
    path = write(request("a"), "", request("b", temperature=0), request("c"))
    assert check(path, CHAT, SMALL) == (3, [])
    left = list(requests(path, CHAT, SMALL, {3}))
    assert [(line.number, line.custom_id) for line in left] == [(1, "a"), (4, "c")]
    assert json.loads(left[0].body) == {"model": "base", "messages": []}


def test_a_file_without_a_last_newline_and_with_a_mark_at_its_beginning_is_read(write):
    path = write(data=b"\xef\xbb\xbf" + json.dumps(request("ä")).encode() + b"\r\n" + json.dumps(request("b")).encode())
    assert [line.custom_id for line in requests(path, CHAT, SMALL)] == ["ä", "b"]


@pytest.mark.parametrize(
    "row, code, param",
    [
        ("{", "invalid_json_line", None),
        ('{"custom_id": "\\ud800"}', "invalid_json_line", None),
        ('{"custom_id": "b", "body": ' + "[" * 400, "invalid_json_line", None),
        ("[]", "invalid_request", None),
        ({"custom_id": 3, "url": CHAT, "body": {}}, "invalid_request", None),
        ({"url": CHAT, "body": {}}, "invalid_request", None),
        ({"custom_id": "", "url": CHAT, "body": {}}, "invalid_request", "custom_id"),
        ({"custom_id": "b", "url": CHAT, "body": []}, "invalid_request", "body"),
        ({**request("b"), "method": "GET"}, "invalid_request", "method"),
        (request("b", url="/v1/keys"), "url_mismatch", "url"),
        (request("a"), "duplicate_custom_id", "custom_id"),
        (request("b", long="x" * 500), "invalid_request", None),
    ],
)
def test_a_line_that_cannot_be_asked_is_told_by_its_number(write, row, code, param):
    total, errors = check(write(request("a"), "", row, request("z")), CHAT, SMALL)
    assert total == 3
    (error,) = errors
    assert (error.line, error.code, error.param) == (3, code, param) and error.message


def test_a_file_without_a_request_and_one_with_too_many_are_refused(write):
    for path, code in ((write(data=b"\n \n"), "empty_batch"),):
        (error,) = check(path, CHAT, SMALL)[1]
        assert (error.code, error.line) == (code, None)
    (error,) = check(write(*(request(f"q{number}") for number in range(6))), CHAT, SMALL)[1]
    assert (error.code, error.line) == ("too_many_tasks", None) and "5" in error.message


def test_a_file_of_garbage_is_told_a_bounded_number_of_times(write):
    limits = replace(SMALL, lines=10_000)
    assert len(check(write(*["x"] * (MAX_ERRORS + 50)), CHAT, limits)[1]) == MAX_ERRORS


def test_a_line_that_later_limits_refuse_is_an_error_and_no_request(write):
    path = write(request("a"), request("b", long="x" * 500))
    first, second = requests(path, CHAT, SMALL)
    assert (first.error, second.number, second.body) == ("", 2, b"") and "500 bytes" in second.error
