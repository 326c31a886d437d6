"""Text for calibration and evaluation: read, cut into windows, and kept apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from optimize.data import text
from optimize.errors import Refused
from optimize.options import Text

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
        ("a.jsonl", '{"text": "a"}\n\n{"text": b}', "line 3 is no JSON: Expecting value at character 10"),
        ("a.jsonl", '{"text": "a"}\n5', "line 2 is neither an object with 'text' or `messages`, nor a text"),
        ("a.jsonl", '[{"text": "a"}]', "line 1 is neither an object"),
        ("a.jsonl", '{"text": 5}', "line 1 is of the type int, and a text or a list of chat"),
        ("a.jsonl", '{"messages": ["hello"]}', "line 1 is a list, but not of chat messages"),
        ("a.jsonl", '"\\ud83d"', "line 1 has half of a character"),
        ("a.jsonl", '{"other": "x"}', "no 'text', but other"),
        ("a.txt", " \n", "holds nothing"),
        ("a.jsonl", '{"text": ""}', "holds nothing"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=says):
        text.documents(Text(text=str(tmp_path / name)), False)


def test_only_a_line_feed_ends_a_line_and_a_mark_of_byte_order_is_no_text(tmp_path):
    rows = ["one \u2028 text", "\u0085 another\x0b", "a third"]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(f"{lines}\r\n\r\n".encode("utf-8-sig"))
    assert text.documents(Text(text=str(tmp_path / "a.jsonl")), False) == rows
    (tmp_path / "a.txt").write_bytes("one\r\n\r\n\r\ntwo".encode("utf-8-sig"))
    assert text.documents(Text(text=str(tmp_path / "a.txt")), False) == ["one", "two"]


def test_windows_are_whole_and_drawn_with_the_seed(tokenizer):
    texts = ["the river ran past a small town " * 20, "old ships " * 3]
    first = text.windows(tokenizer, texts, 5, 16, seed=1)
    assert [len(window) for window in first] == [16] * 5
    assert first == text.windows(tokenizer, texts, 5, 16, seed=1) != text.windows(tokenizer, texts, 5, 16, seed=2)
    with pytest.raises(Refused, match="gives 8 windows of 16 tokens, not 99"):
        text.windows(tokenizer, texts, 99, 16, seed=1)


def test_short_texts_are_joined_wherever_windows_are_taken(tokenizer):
    """Healing took windows of one text each: of a file of short texts nothing, of a mixed one only the long ones."""
    every = text.every_window(tokenizer, ["the river ran past a small town"] * 20, 16, fewest=5)
    assert len(every) >= 5 and {len(window) for window in every} == {16}


def test_a_long_text_becomes_tokens_in_pieces_and_much_of_it_is_drawn_from(tokenizer, monkeypatch):
    line = "the river ran past a small town " * 300
    whole = text.windows(tokenizer, [line], 5, 16, seed=1)
    monkeypatch.setattr(text, "LONGEST", 1000)
    pieces = list(text.pieces(line))
    assert "".join(pieces) == line and max(map(len, pieces)) <= 1000 and all(piece[0] == " " for piece in pieces[1:])
    assert list(text.pieces("x" * 2500)) == ["x" * 1000, "x" * 1000, "x" * 500]
    assert text.windows(tokenizer, [line], 5, 16, seed=1) == whole
    assert text.overlap([line], [line])
    monkeypatch.setattr(text, "ENOUGH", 3000)
    texts = [f"{name} {line}" for name in "abcdefgh"]
    drawn = text.enough(texts, 1, seed=1)
    assert 3000 <= sum(map(len, drawn)) <= 4000 and drawn != text.enough(texts, 1, seed=2)
    assert text.enough(texts, 3000, seed=1) is texts
    assert [len(window) for window in text.windows(tokenizer, texts, 5, 8, seed=1)] == [8] * 5


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


HUB = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LINES = "".join(json.dumps({"said": f"line {at} of the dataset"}) + "\\n" for at in range(3)).encode()
SHA = "a" * 40


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(True)

    def do_GET(self, head=False):
        path = self.path.split("?")[0]
        body, code, extra = b"", 200, {}
        if path.startswith("/api/datasets/team/lines/revision/"):
            files = [{"rfilename": "data/train-0.jsonl"}, {"rfilename": "README.md"}]
            body = json.dumps({"id": "team/lines", "sha": SHA, "siblings": files}).encode()
        elif path.startswith("/api/datasets/team/lines/tree/"):
            files = [{"type": "file", "path": "data/train-0.jsonl", "size": len(LINES), "oid": "b" * 40}]
            body = json.dumps(files).encode()
        elif path == f"/datasets/team/lines/resolve/{SHA}/data/train-0.jsonl":
            body, extra = LINES, {"ETag": '"%s"' % ("b" * 40), "X-Repo-Commit": SHA}
        else:
            body, code, extra = b'{"error": "none"}', 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(code)
        for key, value in {**extra, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
"""
READ = """
import sys
from optimize.data import text
from optimize.errors import OptimizeError
from optimize.options import Text
try:
    print(text.documents(Text(text=sys.argv[1], column="said"), False))
except OptimizeError as error:
    print(error.message)
"""


def test_a_dataset_on_the_hub_is_fetched_once_and_read_without_it(tmp_path):
    hub = subprocess.Popen([sys.executable, "-c", HUB], stdout=subprocess.PIPE, text=True)
    environ = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environ.pop("HF_HUB_OFFLINE", None)

    def read(address: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", READ, address], env={**environ, **more}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        assert hub.stdout is not None
        environ["HF_ENDPOINT"] = f"http://127.0.0.1:{int(hub.stdout.readline())}"
        lines = [f"line {at} of the dataset" for at in range(3)]
        assert read("hf://datasets/team/lines/data/*.jsonl") == str(lines)
        assert "the dataset team/none could not be fetched" in read("hf://datasets/team/none/*.jsonl")
        assert "has no file none-*.jsonl" in read("hf://datasets/team/lines/none-*.jsonl")
    finally:
        hub.kill()
        hub.wait()
    # The steps run without the hub, on what was fetched.
    assert read("hf://datasets/team/lines/data/*.jsonl", HF_HUB_OFFLINE="1") == str(lines)
