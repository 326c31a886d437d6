"""An embedding is computed once, and again when what it came from is another."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from serve.drift.features import kept_embedding
from serve.drift.features.embedding import Embedding
from serve.drift.features.kept_embedding import embedding_of
from serve.errors import ConfigError


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, seed=1)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"12": 3, "a": 4}}}')
    return folder


def write(folder, seed):
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")


@pytest.fixture
def computed(monkeypatch):
    """How often one was."""
    times, of = [], Embedding.of
    monkeypatch.setattr(kept_embedding.Embedding, "of", lambda *args: times.append(args) or of(*args))
    return times


def same(one, other):
    assert one.digest == other.digest
    for name in ("table", "weights", "numbers", "narrow"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert np.array_equal(one.vector([1, 7, 299, 4000]), other.vector([1, 7, 299, 4000]))
    assert np.array_equal(one.mean_row([1, 7, 299]), other.mean_row([1, 7, 299]))


def test_it_is_computed_once_and_the_same(checkpoint, tmp_path, computed):
    first, again = (embedding_of(checkpoint, tmp_path / "cache") for _ in range(2))
    assert len(computed) == 1
    same(first, again)
    same(again, Embedding.of(checkpoint))
    assert type(again.table) is np.ndarray


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_another_checkpoint_in_the_same_place_is_another(checkpoint, tmp_path, computed, file):
    before = embedding_of(checkpoint, tmp_path / "cache")
    if file == "tokenizer.json":
        (checkpoint / file).write_text('{"model": {"vocab": {"12": 5}}}')
    else:
        write(checkpoint, seed=2)
    os.utime(checkpoint / file, ns=(1, 1))
    after = embedding_of(checkpoint, tmp_path / "cache")
    assert len(computed) == 2
    assert (before.digest == after.digest) == (file == "tokenizer.json")
    same(after, Embedding.of(checkpoint))


def test_a_damaged_one_is_computed_again(checkpoint, tmp_path, computed):
    embedding_of(checkpoint, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    (kept / "table.npy").write_bytes(b"x")
    for _ in range(2):
        again = embedding_of(checkpoint, tmp_path / "cache")
        assert len(computed) == 2
    same(again, Embedding.of(checkpoint))


def test_without_room_it_is_computed_every_time(checkpoint, tmp_path, computed):
    (tmp_path / "cache").write_text("a file")
    same(*(embedding_of(checkpoint, tmp_path / "cache") for _ in range(2)))
    assert len(computed) == 2 and (tmp_path / "cache").read_text() == "a file"


def test_one_that_others_put_there_is_taken_where_nothing_can_be_written(checkpoint, tmp_path, computed, monkeypatch):
    made = embedding_of(checkpoint, tmp_path / "cache")

    def refused(*_: object) -> None:
        raise PermissionError("a file system for reading alone")

    monkeypatch.setattr(kept_embedding.os, "utime", refused)
    same(embedding_of(checkpoint, tmp_path / "cache"), made)
    assert len(computed) == 1


def test_few_are_kept(checkpoint, tmp_path):
    for seed in range(kept_embedding.KEPT + 3):
        write(checkpoint, seed)
        os.utime(checkpoint / "model.safetensors", ns=(seed, seed))
        embedding_of(checkpoint, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == kept_embedding.KEPT


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="holds no safetensors file"):
        embedding_of(tmp_path, tmp_path / "cache")
