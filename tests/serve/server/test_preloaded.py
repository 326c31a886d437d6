"""A server begins anew over the libraries that its engines preload; nothing else does."""

from __future__ import annotations

import os

import pytest

from serve.models import hardware
from serve.server.preloaded import BEGUN, ensure


@pytest.fixture
def began(monkeypatch):
    """The command lines that were executed, of a CPU's installation with an OpenMP and without tcmalloc."""
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setattr(hardware, "openmp", lambda: "/x/libiomp5.so")
    monkeypatch.setattr(hardware, "tcmalloc", lambda: None)
    monkeypatch.setenv("LD_PRELOAD", "/y/libgiven.so")
    monkeypatch.setenv(BEGUN, "")
    lines = []

    def run(words, original):
        ensure(words, original, lambda _, line: lines.append(line[1:]))
        return lines

    return run


def test_once_with_the_same_words(began):
    line = ["python", "-m", "serve.cli", "serve", "smollm2"]
    assert began(["serve", "smollm2"], line) == [line[1:]]
    assert os.environ["LD_PRELOAD"] == "/y/libgiven.so:/x/libiomp5.so"
    assert len(began(["serve", "smollm2"], line)) == 1, "they are preloaded now"
    assert BEGUN not in os.environ, "a server that this one may start begins anew for itself"
    assert len(began(["serve", "smollm2"], line)) == 1


def test_once_where_what_is_preloaded_is_taken_away(began, monkeypatch):
    assert len(began(["serve"], ["python", "loradock", "serve"])) == 1
    monkeypatch.delenv("LD_PRELOAD")
    assert len(began(["serve"], ["python", "loradock", "serve"])) == 1


@pytest.mark.usefixtures("began")
def test_a_python_that_cannot_be_executed_again_serves_as_it_is(capsys):
    def execute(program, line):
        raise PermissionError(13, "Permission denied")

    ensure(["serve"], ["python", "loradock", "serve"], execute)
    said = capsys.readouterr().err
    assert "Permission denied" in said and said.count("\n") == 1
    assert BEGUN not in os.environ


@pytest.mark.parametrize(
    "words, original",
    [
        (["plan", "smollm2"], ["python", "loradock", "plan", "smollm2"]),
        ([], ["python", "loradock"]),
        (["serve"], ["python", "-m", "pytest"]),  # called by somebody else's program
    ],
)
def test_not_what_is_no_server(began, words, original):
    assert not began(words, original)


def test_not_where_the_device_is_no_cpu(began, monkeypatch):
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    assert not began(["serve"], ["python", "loradock", "serve"])
