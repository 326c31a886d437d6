"""What an engine takes is read off the headers of its checkpoint's files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from serve.errors import ConfigError
from serve.models import engine_memory, hardware
from serve.models.engine_memory import slots, weights
from serve.models.host import Host
from tests.support.quantized import Scheme

GIB = 1 << 30


def checkpoint(folder, *, tied):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(128, 64).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(256, 64).bfloat16(),
        "model.norm.weight": torch.zeros(64).bfloat16(),
    }
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(128, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_weights_are_there_once(tmp_path):
    assert weights(checkpoint(tmp_path, tied=True)) == 2 * (128 * 64 + 256 * 64 + 64)


def test_of_rounded_weights_the_scales_count_and_the_embedding_stays(tmp_path):
    rest, layer, table = 2 * 64, 256 * 64, 128 * 64
    assert weights(checkpoint(tmp_path, tied=False), "int8") == rest + layer * 8.5 / 8 + table * (2 + 8.5 / 8)
    assert weights(checkpoint(tmp_path, tied=False), "int4") == rest + layer * 4.5 / 8 + table * (2 + 8.5 / 8)


def test_a_tied_output_layer_of_fewer_bits_is_one_more_matrix(tmp_path):
    assert weights(checkpoint(tmp_path, tied=True), "int8") == 2 * 64 + 256 * 64 * 8.5 / 8 + 128 * 64 * (2 + 8.5 / 8)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_in_a_batch_take_their_a_and_b(tmp_path, tied):
    assert slots(checkpoint(tmp_path, tied=tied), 3, 8) == 3 * 8 * 2 * (64 + 256)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("pack-quantized", group=32),
        Scheme("pack-quantized", bits=8),
        Scheme("gptq", group=32),
        Scheme("awq", group=32, points=True),
        Scheme("float-quantized"),
    ],
    ids=lambda scheme: f"{scheme.layout} {scheme.bits}",
)
def test_adapters_of_quantized_layers_are_as_large(tmp_path, scheme):
    made = scheme.rounded(torch.randn(256, 64).bfloat16())
    tensors = {f"model.layers.0.mlp.up_proj.{name}": tensor.contiguous() for name, tensor in made.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": scheme.config()}))
    assert slots(tmp_path, 3, 8) == 3 * 8 * 2 * (64 + 256)


def test_a_large_table_that_is_only_looked_up_needs_no_memory_of_its_own(tmp_path, monkeypatch):
    table, layer = 2 * 128 * 64, 256 * 64
    monkeypatch.setattr(engine_memory, "IN_FILE", table)
    rest = 2 * layer + 2 * 64
    folder = checkpoint(tmp_path, tied=False)
    assert weights(folder, fused=True) == rest + table
    assert weights(folder, "int4", fused=True) == 2 * 64 + layer * 4.5 / 8 + 128 * 64 * 8.5 / 8
    tied = checkpoint(tmp_path, tied=True)
    assert weights(tied, fused=True) == rest + table  # it is multiplied too
    assert weights(tied, "int8", fused=True) == 2 * 64 + layer * 8.5 / 8 + 128 * 64 * 8.5 / 8
    monkeypatch.setattr(engine_memory, "IN_FILE", table + 1)
    assert weights(tied, fused=True) == rest + table


@pytest.mark.parametrize("entries, dtype", [(130, torch.bfloat16), (128, torch.float16)], ids=["padded", "float16"])
def test_a_table_that_is_changed_as_it_is_read_stays_in_memory(tmp_path, monkeypatch, entries, dtype):
    monkeypatch.setattr(engine_memory, "IN_FILE", 1)
    tensors = {name: torch.zeros(entries, 64, dtype=dtype) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights(tmp_path, fused=True) == 2 * 2 * entries * 64


def test_only_the_kernels_that_compute_whole_steps_put_it_into_a_file(monkeypatch):
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setenv(hardware.ARM64, "1")
    monkeypatch.setattr(Host, "instructions", lambda self: frozenset({"asimddp", "avx", "avx2", "f16c", "fma"}))
    assert hardware.fused_step("auto") and not any(map(hardware.fused_step, ("layers", "compile", "off")))


def test_a_file_that_is_none_counts_by_its_size(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert weights(tmp_path) == 1000 and slots(tmp_path, 8, 8) == 0


def test_a_control_group_that_is_too_small_is_a_sentence_that_names_everything(tmp_path):
    for name, text in {
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{6 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB}\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    host = Host(tmp_path)
    left = 5 * GIB - hardware.OVERHEAD
    hardware.check_memory(left - 2 * GIB, GIB, host, GIB)
    with pytest.raises(ConfigError) as caught:
        hardware.check_memory(left - 2 * GIB, GIB, host, GIB + 1)
    for words in ("1.0 GiB of slots for adapters", "5.0 GiB of memory that are free", "max_loras"):
        assert words in str(caught.value)
