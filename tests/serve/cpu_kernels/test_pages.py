"""What is given back to the kernel, and what is read there afterwards."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from serve.cpu_kernels import pages

SIZE = 1 << 20


def resident(file: Path) -> int:
    """Bytes of a mapped file that count as this process's."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    rows = [re.search(r"^Rss:\s+(\d+) kB", part, re.MULTILINE) for part in parts if str(file) in part]
    return sum(int(row[1]) << 10 for row in rows if row)


def test_memory_of_its_own_reads_as_zeros_and_its_neighbours_stay():
    whole = torch.ones(3 * SIZE, dtype=torch.uint8)
    pages.drop(whole[SIZE + 5 : 2 * SIZE + 7])
    assert whole[: SIZE + 5].all() and whole[2 * SIZE + 7 :].all()
    assert whole[SIZE + 4101 : 2 * SIZE - 4096].sum() == 0
    whole.fill_(2)
    assert whole.sum() == 6 * SIZE
    pages.drop(whole[5:90])  # no whole page
    assert whole[5:90].eq(2).all()


@pytest.mark.parametrize("name", ["model.safetensors", "5a7e"], ids=["a folder", "a hub's cache"])
def test_of_a_checkpoints_file_one_tensor_at_a_time_is_in_memory(tmp_path, name):
    file, link = tmp_path / name, tmp_path / "link.safetensors"
    made = {name: torch.randn(SIZE) for name in "abcd"}
    save_file(made, file)
    link.symlink_to(file)
    most = 0
    with safe_open(link, framework="pt") as opened:
        kept = {}
        for name, tensor in pages.read_once((name, opened.get_tensor(name)) for name in "abcd"):
            tensor.sum()
            kept[name] = tensor
            most = max(most, resident(file))
        assert SIZE < most < 2 * 4 * SIZE
        assert all(torch.equal(kept[name], made[name]) for name in made)  # read again


def test_weights_that_come_in_no_file_stay_as_they_are():
    ones = torch.ones(SIZE)
    assert all(tensor.all() for _, tensor in pages.read_once([("a", ones), ("b", ones)])) and ones.all()


def test_a_large_table_is_looked_up_in_a_file_that_nobody_else_can_change(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "LARGE", SIZE)
    loaded = []
    parameter = torch.nn.Parameter(torch.empty(300, 2048, dtype=torch.bfloat16), requires_grad=False)
    parameter.weight_loader = lambda parameter, read: loaded.append(parameter.data.copy_(read))
    pages.keep_in_file(parameter, tmp_path / "new")
    table = torch.randn(300, 2048).bfloat16()
    parameter.weight_loader(parameter, table)
    assert not loaded and torch.equal(parameter.data, table) and not list((tmp_path / "new").iterdir())
    before = resident(Path("(deleted)"))
    pages.leave(parameter)
    assert resident(Path("(deleted)")) <= before - table.nbytes
    assert torch.equal(torch.nn.functional.embedding(torch.tensor([7, 299]), parameter), table[[7, 299]])
    with pytest.raises(RuntimeError):  # of another shape: it is said where it always was
        parameter.weight_loader(parameter, table[:, :3])


def test_where_the_disk_is_full_a_table_stays_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "LARGE", SIZE)
    monkeypatch.setattr(pages.os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    parameter = torch.nn.Parameter(torch.empty(300, 2048, dtype=torch.bfloat16), requires_grad=False)
    parameter.weight_loader = lambda parameter, read: parameter.data.copy_(read)
    pages.keep_in_file(parameter, tmp_path)
    parameter.weight_loader(parameter, table := torch.randn(300, 2048).bfloat16())
    assert torch.equal(parameter.data, table) and not hasattr(parameter, "loradock_in_file")
    pages.leave(parameter)
    assert torch.equal(parameter.data, table)


def test_a_small_table_is_loaded_as_ever():
    parameter = torch.nn.Parameter(torch.empty(4, 4), requires_grad=False)
    parameter.weight_loader = load = object()
    pages.keep_in_file(parameter, Path("/nowhere"))
    assert parameter.weight_loader is load
