"""An ONNX graph that is made without the model's matrices, which are written one at a time afterwards.

The graph has each matrix of the checkpoint by name, in a file that there is none of; `written` puts them beside it, as
they are or in 8 or 4 bits by ONNX Runtime's own weight quantizer. So memory holds none but a part of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from optimize.checkpoint import formats
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import skeleton

GRAPH = "model.onnx"
ABSENT = "absent"  # the file that holds the matrices of a graph without them
BLOCK = 32  # weights that share a scale
HELD = 1 << 25  # weights that are in memory at a time
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


def written(source: Path, folder: Path, named: Mapping[str, str], out: Path, bits: int = 0) -> None:
    """The graph `source` with the matrices of the checkpoint in `folder`, in `out`; with `bits` those that are
    multiplied with are rounded."""
    import onnx

    model = onnx.load(source, load_external_data=False)
    graph, checkpoint = model.graph, Checkpoint(folder)
    absent = {item.name for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    turned = _turned(graph, absent)
    small = [item for item in graph.initializer if item.name not in absent]
    del graph.initializer[:]
    nodes = [node for node in graph.node if node.output[0] not in turned]
    with (out / f"{GRAPH}.data").open("wb") as data:
        for item in small:
            graph.initializer.append(_beside(data, item) if len(item.raw_data) > SMALL else item)
        for at, node in enumerate(nodes):
            if node.op_type == "MatMul" and node.input[1] in turned:
                weight = _tensor(checkpoint, named[turned[node.input[1]]])
                if bits:
                    nodes[at] = _rounded(data, graph, node, weight, bits)
                else:
                    shape = (weight.shape[1], weight.shape[0])
                    rows = (part.T.contiguous() for part in _parts(weight, 1))
                    graph.initializer.append(_put(data, node.input[1], onnx.TensorProto.FLOAT, shape, rows))
        used = {name for node in nodes for name in node.input}
        for name in sorted(absent & used):
            weight = _tensor(checkpoint, named[name])
            graph.initializer.append(_put(data, name, onnx.TensorProto.FLOAT, weight.shape, _parts(weight, 0)))
    del graph.node[:]
    graph.node.extend(nodes)
    if bits and not any(item.domain == "com.microsoft" for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, out / GRAPH)


def _turned(graph: Any, absent: set[str]) -> dict[str, str]:
    """The matrices that are only multiplied with, turned around, by the name that they have then."""
    readers = Counter(name for node in graph.node for name in node.input)
    multiplied = Counter(node.input[1] for node in graph.node if node.op_type == "MatMul")
    return {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in absent and readers[node.input[0]] == 1
        and readers[node.output[0]] == multiplied[node.output[0]] == 1
    }  # fmt: skip


def _rounded(data: BinaryIO, graph: Any, node: Any, weight: torch.Tensor, bits: int) -> Any:
    """The product with `weight` (out, in) in 8 or 4 bits."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)
    parts = [quantizer.qbits_block_quant(part.T.contiguous().numpy())[:2] for part in _parts(weight, 0)]
    packed, scales = (np.concatenate(of) for of in zip(*parts, strict=True))
    name, (columns, width) = node.input[1], weight.shape
    graph.initializer.append(
        _put(data, f"{name}_Q{bits}", onnx.TensorProto.UINT8, packed.shape, [torch.from_numpy(packed)])
    )
    graph.initializer.append(
        _put(data, f"{name}_scales", onnx.TensorProto.FLOAT, scales.shape, [torch.from_numpy(scales)])
    )
    return onnx.helper.make_node(
        "MatMulNBits", [node.input[0], f"{name}_Q{bits}", f"{name}_scales"], list(node.output), f"{node.name}_Q{bits}",
        domain="com.microsoft", K=width, N=columns, bits=bits, block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip


def _parts(weight: torch.Tensor, across: int) -> Iterator[torch.Tensor]:
    """The weight in fp32, some of its rows (0) or columns (1) at a time."""
    for part in weight.split(max(1, HELD * weight.shape[across] // weight.numel()), across):
        yield part.float().contiguous()


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
