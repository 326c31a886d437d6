"""Text for calibration and evaluation: read, cut into windows, and kept apart."""

from __future__ import annotations

import json

import pytest

from optimize import text
from optimize.errors import Refused
from optimize.recipe import Text

LONG = "This paragraph is long enough that two texts that hold it have it from one another: {}."


def test_jsonl_text_and_parquet_are_read_alike(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = ["one text", "another text"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    (tmp_path / "a.txt").write_text("\n\n\n".join(rows))
    parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        assert text.documents(Text(text=str(tmp_path / name), column="body"), False) == rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "x", "not .jsonl, .txt or .parquet"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl", '{"other": "x"}', "no 'text', but other"),
        ("a.txt", " \n", "holds nothing"),
        ("a.jsonl", '{"text": ""}', "holds nothing"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=says):
        text.documents(Text(text=str(tmp_path / name)), False)


def test_windows_are_whole_and_drawn_with_the_seed(tokenizer):
    texts = ["the river ran past a small town " * 20, "old ships " * 3]
    first = text.windows(tokenizer, texts, 5, 16, seed=1)
    assert [len(window) for window in first] == [16] * 5
    assert first == text.windows(tokenizer, texts, 5, 16, seed=1) != text.windows(tokenizer, texts, 5, 16, seed=2)
    with pytest.raises(Refused, match="gives 8 windows of 16 tokens, not 99"):
        text.windows(tokenizer, texts, 99, 16, seed=1)


def test_a_shared_paragraph_is_found_however_it_is_spaced():
    mine, theirs = LONG.format("mine"), LONG.format("theirs")
    assert text.overlap([mine], [theirs]) == []
    assert len(text.overlap([f"{mine}\n{theirs}"], [theirs.upper().replace(" ", "  ")])) == 1


def test_wiki_markup_becomes_prose():
    markup = (
        "{{Infobox|a={{b}}}}'''Town''' is a [[place|small place]] in [[France]].&lt;ref&gt;x&lt;/ref&gt;\n"
        "{| class=t\n| cell\n|}\n* list\n== History ==\nIt [http://a.b was] old.\n== See also ==\nnothing"
    )
    assert text._plain(markup) == "Town is a small place in France.\nHistory\nIt was old."


def test_the_embedded_text_is_split_by_title_and_shares_nothing():
    split = text.default()
    assert len(split["calibration"]) > 40 and len(split["evaluation"]) > 20
    text.apart(split["calibration"], split["evaluation"])
    assert not set(split["calibration"]) & set(split["evaluation"])
