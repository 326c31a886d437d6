"""What a file of golden cases may look like."""

from __future__ import annotations

import json

import pytest

from serve.cli.golden import read_document
from serve.errors import ConfigError

CASE = {"prompt": "x", "equals": "y"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"cases": [CASE, CASE]}),
        json.dumps([CASE, CASE], indent=2),
        f"{json.dumps(CASE)}\n\n{json.dumps(CASE)}\n",
    ],
)
def test_a_document_a_list_and_a_case_a_line_are_the_same(tmp_path, text):
    file = tmp_path / "golden"
    file.write_text(text)
    assert read_document(file) == {"cases": [CASE, CASE]}


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_a_line_ends_where_json_lines_do(tmp_path, character):
    file = tmp_path / "golden"
    case = {"prompt": f"x{character}y", "equals": "y"}
    file.write_text(f"{json.dumps(case, ensure_ascii=False)}\r\n{json.dumps(CASE)}\n")
    assert read_document(file) == {"cases": [case, CASE]}


def test_one_case_is_a_set_and_what_stands_beside_the_cases_stays(tmp_path):
    file = tmp_path / "golden"
    file.write_text(json.dumps(CASE))
    assert read_document(file) == {"cases": [CASE]}
    document = {"cases": [CASE], "shadow": {"share": 0.1}}
    file.write_text(json.dumps(document))
    assert read_document(file) == document


@pytest.mark.parametrize(("text", "words"), [(f"{json.dumps(CASE)}\n{{", "line 2"), ("3", "neither")])
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, words):
    file = tmp_path / "golden"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_document(file)


def test_a_file_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(tmp_path / "missing")
