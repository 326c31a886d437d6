"""An ONNX graph that is made without the model's matrices, which are written one at a time afterwards.

The graph has each matrix of the checkpoint by name, in a file that there is none of; `written` puts them beside it, as
they are or in few bits (`optimize.export.blocks`). So memory holds none but a part of one. What another exporter wrote
whole is read the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from optimize.checkpoint import formats
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import skeleton
from optimize.export import blocks
from optimize.export.blocks import Weight, parts

GRAPH = "model.onnx"
ABSENT = "absent"  # the file that holds the matrices of a graph without them
SMALL = 1024  # numbers, or bytes, up to which a tensor lies in the graph itself
ALIGNED = 64


def ghost(folder: Path) -> tuple[nn.Module, dict[str, str]] | None:
    """The model in fp32 with zeros that take no memory for its matrices, and their names in the checkpoint by those in
    the model; None where the checkpoint has a model's weights in another form."""
    checkpoint = Checkpoint(folder)
    model = skeleton(folder, torch.float32)
    model.tie_weights()
    names = [name for name, _ in model.named_parameters()]
    if set(names) - set(checkpoint.shapes):
        return None
    # Two small tensors of the same numbers become one in the graph, and zeros are the same.
    large = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.numel() > SMALL}
    matrices = {name: shape for name, shape in large.items() if len(shape) == 2}
    weights = {name: torch.from_numpy(np.zeros(shape, np.float32)) for name, shape in matrices.items()}
    weights |= {name: _tensor(checkpoint, name).float() for name in names if name not in matrices}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    of = {id(parameter): name for name, parameter in model.named_parameters() if name in matrices}
    every = model.named_parameters(remove_duplicate=False)
    named = {name: of[id(parameter)] for name, parameter in every if id(parameter) in of}
    return model.eval().requires_grad_(False), named


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    module = name.rpartition(".")[0]
    return dict(formats.dense(checkpoint, lambda other: other.rpartition(".")[0] == module))[name]


@contextmanager
def unfolded(names: Collection[str]) -> Iterator[None]:
    """The graph's optimizer computes nothing from a matrix that is not there."""
    import onnxscript.optimizer

    original = onnxscript.optimizer.optimize_ir

    def optimize(
        model: Any, *args: Any, should_fold: Callable[[Any], bool | None] = lambda _: None, **more: Any
    ) -> None:
        absent = {id(value) for name, value in model.graph.initializers.items() if name in names}

        def may(node: Any) -> bool | None:
            return False if any(id(value) in absent for value in node.inputs) else should_fold(node)

        original(model, *args, should_fold=may, **more)

    onnxscript.optimizer.optimize_ir = optimize
    try:
        yield
    finally:
        onnxscript.optimizer.optimize_ir = original


def save(program: Any, named: Mapping[str, str], file: Path) -> None:
    """The graph of torch's `program` without its matrices."""
    import onnx_ir

    for name, value in program.model.graph.initializers.items():
        if name in named:
            tensor = value.const_value
            value.const_value = onnx_ir.ExternalTensor(
                ABSENT, 0, tensor.nbytes, tensor.dtype, name=name, shape=tensor.shape, base_dir=str(file.parent)
            )
    onnx_ir.save(program.model, file)


def written(model: Any, weights: Mapping[str, Weight], out: Path, bits: int = 0) -> None:
    """The graph of `model` with the matrices that `weights` reads by their names in it, in `out`; with `bits` those
    that are multiplied with, and the tables of tokens, are rounded."""
    import onnx

    graph = model.graph
    turned = {node.output[0]: node.input[0] for node in graph.node if _turns(node) and node.input[0] in weights}
    small = [item for item in graph.initializer if item.name not in weights]
    del graph.initializer[:]
    with (out / f"{GRAPH}.data").open("wb") as data:
        for item in small:
            graph.initializer.append(_beside(data, item) if len(item.raw_data) > SMALL else item)
        if bits:
            nodes = blocks.rounded(graph, turned, weights, bits, partial(_put, data))
        else:
            _turned(data, graph, turned, weights)
            nodes = list(graph.node)
        there = {item.name for item in graph.initializer}
        needless = turned.keys() - ({name for node in nodes for name in node.input} - there)
        nodes = [node for node in nodes if node.output[0] not in needless]
        used = {name for node in nodes for name in node.input}
        for name in sorted(weights.keys() & used):
            weight = weights[name].read()
            graph.initializer.append(_put(data, name, onnx.TensorProto.FLOAT, weight.shape, parts(weight, 0)))
    del graph.node[:]
    graph.node.extend(nodes)
    if bits and not any(item.domain == blocks.DOMAIN for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(blocks.DOMAIN, 1))
    onnx.save(model, out / GRAPH)


def matrices(model: Any, checkpoint: Checkpoint, named: Mapping[str, str]) -> dict[str, Weight]:
    """The matrices that are absent from `model`, by their names there; `named` are the checkpoint's for them."""
    return {
        item.name: Weight(tuple(item.dims), partial(_tensor, checkpoint, named[item.name]))
        for item in model.graph.initializer
        if item.external_data
    }


def stored(model: Any, source: Path) -> dict[str, Weight]:
    """The matrices of `model`, whose file is in `source`, by their names; its other tensors are read into it."""
    from onnx import TensorProto, external_data_helper

    weights = {}
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT and len(item.dims) == 2 and math.prod(item.dims) > SMALL:
            matrix = TensorProto()
            matrix.CopyFrom(item)
            weights[item.name] = Weight(tuple(item.dims), partial(_array, matrix, source))
        elif item.external_data:
            external_data_helper.load_external_data_for_tensor(item, str(source))
            item.data_location = TensorProto.DEFAULT
            del item.external_data[:]
    return weights


def _array(matrix: Any, source: Path) -> torch.Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(matrix, str(source)).copy())


def _turns(node: Any) -> bool:
    """Whether the node turns a matrix around."""
    return node.op_type == "Transpose" and all(list(item.ints) == [1, 0] for item in node.attribute)


def _turned(data: BinaryIO, graph: Any, turned: Mapping[str, str], weights: Mapping[str, Weight]) -> None:
    """The matrices that are only multiplied with, turned around, are written as they are multiplied with."""
    import onnx

    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        name = node.input[1] if node.op_type == "MatMul" else ""
        if name in turned and readers[name] == readers[turned[name]] == 1:
            weight = weights[turned[name]].read()
            shape = (weight.shape[1], weight.shape[0])
            rows = (part.T.contiguous() for part in parts(weight, 1))
            graph.initializer.append(_put(data, name, onnx.TensorProto.FLOAT, shape, rows))


def _beside(data: BinaryIO, tensor: Any) -> Any:
    return _put(
        data,
        tensor.name,
        tensor.data_type,
        tuple(tensor.dims),
        [torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8)],
    )


def _put(data: BinaryIO, name: str, kind: int, shape: Iterable[int], parts: Iterable[torch.Tensor]) -> Any:
    """A tensor whose numbers are at the end of `data`."""
    import onnx

    data.write(bytes(-data.tell() % ALIGNED))
    start = data.tell()
    for part in parts:
        data.write(part.numpy().data)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    where = {"location": f"{GRAPH}.data", "offset": start, "length": data.tell() - start}
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in where.items())
    return tensor
