"""The embedding table is found in every kind of checkpoint, and means the same in each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from serve.drift.features.embedding import Embedding
from serve.errors import ConfigError
from serve.models.gguf import conversion
from serve.models.gguf.checkpoint import Form
from serve.models.gguf.families import values
from serve.models.gguf.file import GGUF
from serve.models.input_embedding import rows
from tests.support.gguf_files import write

TABLE = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_come_as_float32_to_the_bit(tmp_path, dtype):
    tensors = {"model.embed_tokens.weight": TABLE.to(dtype), "lm_head.weight": TABLE * 2, "z": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    table = rows(tmp_path)
    assert table.shape == (300, 16)
    assert np.array_equal(table[:], TABLE.to(dtype).float().numpy())
    assert np.array_equal(table[np.array([7, 3])], TABLE.to(dtype).float().numpy()[[7, 3]])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_rows_that_stay_as_they_are_in_a_gguf_file_are_read_too(kind, tmp_path):
    file = write(tmp_path / "a.gguf", "qwen2", kind)
    (folder := tmp_path / "kept").mkdir()
    conversion.convert(file, folder, Form.KEPT, lambda share: None)
    table, theirs = rows(folder), values(GGUF.open(file).tensors["token_embd.weight"])
    assert table.shape == theirs.shape
    assert np.array_equal(table[:], theirs) and np.array_equal(table[np.array([7, 3])], theirs[[7, 3]])
    embedding = Embedding.of(folder)
    assert len(embedding.table) == len(theirs) and embedding.mean_row([1, 2, 3]).any()


def test_shards_and_a_tied_head_give_the_same_embedding(tmp_path):
    whole, sharded, tied = (tmp_path / name for name in ("whole", "sharded", "tied"))
    for folder in (whole, sharded, tied):
        folder.mkdir()
    save_file({"transformer.wte.weight": TABLE}, whole / "model.safetensors")
    save_file({"a": torch.zeros(2)}, sharded / "model-00001-of-00002.safetensors")
    save_file({"model.embed_tokens.weight": TABLE}, sharded / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"lm_head.weight": TABLE}, tied / "model.safetensors")
    made = [Embedding.of(folder) for folder in (whole, sharded, tied)]
    assert len({embedding.digest for embedding in made}) == 1
    assert all(np.array_equal(made[0].vector([1, 2, 3]), embedding.vector([1, 2, 3])) for embedding in made)
    assert Embedding.of(whole, seed=1).digest != made[0].digest


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="holds no safetensors file"):
        rows(tmp_path)
    save_file({"other": TABLE}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="switch drift off"):
        rows(tmp_path)
    save_file({"embed_tokens.weight": TABLE.to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"I8 \[300, 16\]"):
        rows(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        rows(tmp_path)
    save_file({"embed_tokens.weight": TABLE}, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match="cut short"):
        rows(tmp_path)


def test_which_tokens_are_numbers_is_read_from_the_tokenizer(tmp_path):
    save_file({"embed_tokens.weight": TABLE}, tmp_path / "model.safetensors")
    assert Embedding.of(tmp_path).numbers is None
    pairs = [("a", 0), ("7", 3), ("\u0120" + "42", 9), ("##5", 11), ("x2", 12), ("\u2581" + "1", 20), ("8", 999)]
    listed = [["a", 0.0]] * 300
    for token, number in pairs[:-1]:
        listed[number] = [token, -1.0]
    bpe, unigram = {"model": {"vocab": dict(pairs)}}, {"model": {"vocab": listed}}
    for name, content in (("vocab.json", dict(pairs)), ("tokenizer.json", bpe), ("tokenizer.json", unigram)):
        (tmp_path / name).write_text(json.dumps(content))
        numbers = Embedding.of(tmp_path).numbers
        assert len(numbers) == 301 and np.flatnonzero(numbers).tolist() == [3, 9, 11, 20]
    for damaged in ("{", "[]", '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        assert Embedding.of(tmp_path).numbers is None


def test_common_tokens_weigh_less():
    embedding = Embedding.project(TABLE.numpy())
    assert embedding.weights[0] < 0.02 < embedding.weights[-1]


def test_mean_rows_of_short_prompts_spread_no_more_than_those_of_long_ones():
    rng = np.random.default_rng(0)
    embedding = Embedding.project(rng.standard_normal((500, 96)).astype(np.float32))
    spreads = [np.std([embedding.mean_row(rng.integers(0, 500, length)) for _ in range(300)]) for length in (4, 16, 60)]
    assert max(spreads) < 1.4 * min(spreads)
    assert not embedding.mean_row([]).any()
