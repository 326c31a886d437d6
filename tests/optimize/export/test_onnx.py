"""The ONNX graph computes what PyTorch computes, token by token through its cache."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx.numpy_helper import to_array

from optimize import cli
from optimize.checkpoint.model import logits, opened
from optimize.errors import Refused
from optimize.evaluation.evaluate import compared
from optimize.export import blocks, onnx, streamed
from optimize.export.session import Answer, Session
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(1, 32)


def exported(job, precision, **more):
    made = job("onnx", precision=precision, format="onnx", **{"out": precision, **more})
    return made.folder / "model", onnx.run(made, silent)


@pytest.fixture(scope="module")
def exports() -> dict[str, tuple[Path, dict[str, Any]]]:
    return {}


@pytest.fixture
def fp32(exports, job) -> tuple[Path, dict[str, Any]]:
    """One export in fp32 for all tests, and its notes: the exporter takes ten seconds."""
    if "fp32" not in exports:
        exports["fp32"] = exported(job, "fp32", out="once")
    return exports["fp32"]


def test_fp32_is_pytorch_and_its_bytes_are_the_same_each_time(base, job, fp32, capsys, tmp_path):
    folder, notes = fp32
    assert notes["logits_off"] < 1e-4 and notes["greedy_same"] == 64
    session = Session(folder)
    assert torch.allclose(session.logits(IDS), logits(opened(base, torch.float32), IDS), atol=1e-4)
    # The prefill in two pieces is the prefill in one.
    first, cache = session.step(IDS[:, :20].numpy(), None)
    second, _ = session.step(IDS[:, 20:].numpy(), cache)
    whole = session.logits(IDS)
    assert torch.allclose(torch.cat([torch.from_numpy(first), torch.from_numpy(second)], 1), whole, atol=1e-4)
    before = {file.name: file.read_bytes() for file in folder.glob("model.onnx*")}
    shutil.copytree(folder, tmp_path / "before")
    answers_and_says_what_is_no_export(tmp_path / "before", capsys, tmp_path)
    exports_of_earlier_versions_run(tmp_path / "before", whole)
    again, _ = exported(job, "fp32")
    assert before == {file.name: file.read_bytes() for file in again.glob("model.onnx*")}


def answers_and_says_what_is_no_export(folder, capsys, tmp_path):
    asked = ["run-onnx", str(folder), "the river ran", "--tokens", "8"]
    capsys.readouterr()  # what the exporter said
    assert cli.run(asked, lambda name: folder) == 0
    said = capsys.readouterr()
    assert len(said.out.split()) >= 1 and "tokens/s, cpu)" in said.err
    pieces = list(Answer(folder, "the river ran", 8))
    assert len([piece for piece in pieces if piece]) > 2 and "".join(pieces) == said.out.rstrip("\n")
    assert cli.run([*asked, "--adapter", "tone"], lambda name: folder) == 2
    assert "has no adapter 'tone': it has none" in capsys.readouterr().err
    assert cli.run(["run-onnx", str(folder), "the " * 400], lambda name: folder) == 2
    assert re.search(r"the prompt has \d+ tokens, and the model was made for \d+ with", capsys.readouterr().err)
    assert cli.run(["run-onnx", str(tmp_path), "hello"], lambda name: folder) == 2
    with pytest.raises(Refused, match="is no ONNX export"):
        Session(tmp_path)


def exports_of_earlier_versions_run(folder, whole):
    """Their inputs and outputs had the names that transformers gives."""
    import onnx as graphs

    model = graphs.load(folder / "model.onnx", load_external_data=False)
    names = {}
    for side, items in (("input", model.graph.input), ("output", model.graph.output)):
        for item in items:
            _, dot, rest = item.name.partition(".")
            if dot:
                at, part = rest.split(".")
                names[item.name] = item.name = f"{side}.past_key_values.layers.{at}.{part}s"
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    graphs.save(model, folder / "model.onnx")
    session = Session(folder)
    assert session.cache[0] == "input.past_key_values.layers.0.keys"
    _, cache = session.step(IDS[:, :20].numpy(), None)
    assert torch.allclose(torch.from_numpy(session.step(IDS[:, 20:].numpy(), cache)[0]), whole[:, 20:], atol=1e-4)


@pytest.fixture
def int4(exports, job, monkeypatch) -> tuple[Path, dict[str, Any]]:
    """One export in int4 for all tests, each matrix of it written in parts."""
    if "int4" not in exports:
        monkeypatch.setattr(blocks, "HELD", 5000)
        exports["int4"] = exported(job, "int4")
    return exports["int4"]


def test_matrices_that_are_written_one_at_a_time_are_what_onnxruntime_makes_of_the_whole_graph(fp32, int4):
    import onnx as graphs
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    whole, _ = fp32
    right = MatMulNBitsQuantizer(
        graphs.load(whole / "model.onnx"), bits=4, block_size=32, is_symmetric=True, accuracy_level=4
    )
    right.process()
    folder, _ = int4
    made, expected = graphs.load(folder / "model.onnx").graph, right.model.model.graph
    both = (made, expected)
    products, wanted = ({node.name: node for node in graph.node if "layers." in node.name} for graph in both)
    assert products == wanted and sum(node.op_type == "MatMulNBits" for node in products.values()) == 21
    tensors, right = ({item.name: to_array(item) for item in graph.initializer} for graph in (made, expected))
    of_layers = {name for node in products.values() for name in node.input} & right.keys()
    assert len(of_layers) == 42 and all((tensors[name] == right[name]).all() for name in of_layers)


def test_the_table_of_tokens_is_in_8_bits_and_in_the_file_once_where_it_is_the_output_layer_too(fp32, int4):
    """ONNX Runtime's own quantizer leaves both in float32."""
    import onnx as graphs

    graph = graphs.load(int4[0] / "model.onnx", load_external_data=False).graph
    nodes = {node.op_type: node for node in graph.node if "layers." not in node.name}
    table, head = nodes["GatherBlockQuantized"], nodes["MatMulNBits"]
    places = {item.name: {part.key: part.value for part in item.external_data} for item in graph.initializer}
    assert places[table.input[0]] == places[head.input[1]] != {} and places[table.input[2]] == places[head.input[2]]
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Transpose") and node.input[-1] in places]
    # What is looked up is the table, to half of a step of 8 bits; the largest number of a block to a step.
    values = {item.name: to_array(item, str(int4[0])) for item in graph.initializer}
    integers, scales = values[table.input[0]].astype(float) - 128, values[table.input[2]]
    near = integers * scales.repeat(32, 1)
    whole = next(item for item in graphs.load(fp32[0] / "model.onnx").graph.initializer if item.name in table.input[0])
    off = abs(near - to_array(whole)) / abs(scales).repeat(32, 1)
    assert off.max() < 1.01 and off.mean() < 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_a_graph_that_another_exporter_wrote_whole_is_rounded_the_same_way(tied, fp32, tmp_path):
    """As optimum writes it: each matrix as it is multiplied with, the output layer beside the table."""
    import onnx as graphs
    from onnx.numpy_helper import from_array

    model = graphs.load(fp32[0] / "model.onnx")
    gather = next(node for node in model.graph.node if "input_ids" in node.input and node.op_type == "Gather")
    table = next(item for item in model.graph.initializer if item.name == gather.input[0])
    turn = next(node for node in model.graph.node if node.op_type == "Transpose" and table.name in node.input)
    head = to_array(table)[:: 1 if tied else -1].T
    model.graph.node.remove(turn)
    model.graph.initializer.append(from_array(head.copy(), turn.output[0]))
    whole, out = tmp_path / "whole", tmp_path / "out"
    for folder in (whole, out):
        folder.mkdir()
        shutil.copy(fp32[0] / "config.json", folder)
    graphs.save(model, whole / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=512)
    read = graphs.load(whole / "model.onnx", load_external_data=False)
    streamed.written(read, streamed.stored(read, whole), out, 8)
    tensors = graphs.load(out / "model.onnx", load_external_data=False).graph.initializer
    places = {item.name: [part.value for part in item.external_data] for item in tensors}
    assert (places[f"{table.name}_table_Q8"] == places[f"{turn.output[0]}_Q8"]) == tied
    off = abs(Session(out).logits(IDS) - Session(whole).logits(IDS)).max()
    assert 0 < off < 0.2


@pytest.mark.parametrize(("precision", "shrinks"), [("fp16", 0.55), ("int8", 0.3), ("int4", 0.2)])
def test_fewer_bits_are_smaller_and_say_what_they_lost(precision, shrinks, base, adapter, job, request):
    if precision == "int4":
        folder, notes = request.getfixturevalue("int4")
    else:
        folder, notes = exported(job, precision, adapters={"one": adapter(1)} if precision == "fp16" else None)
    assert 0 < notes["logits_off"] < 3
    session, plain = Session(folder), opened(base, torch.float32)
    scores = compared([logits(plain, IDS)], [session.logits(IDS)], [IDS], lambda _: None)
    assert (scores["kl"] > 0 or precision == "fp16") and scores["kl"] < 0.5
    weights = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    assert weights < shrinks * 4 * sum(p.numel() for p in plain.parameters()) + 500_000  # the graph itself
