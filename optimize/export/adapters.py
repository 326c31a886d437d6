"""Adapters of an ONNX graph: each module that some adapter changes has A and B as inputs, zero where nobody gives them.

An adapter file (`onnxruntime.AdapterFormat`) holds values for them, of its own rank, with the scale in B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from optimize.errors import OptimizeError
from optimize.export.layout import product
from optimize.steps.merge.merge import Adapter


def parameters(module: str) -> tuple[str, str]:
    """The names of a module's A and B."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def adaptable(file: Path, modules: Collection[str]) -> type[np.floating]:
    """The graph takes A and B of `modules`; what they are made of: float32, or float16 as the graph."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    dtype = np.float16 if half else np.float32
    if not modules:
        return dtype
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    products = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "MatMulNBits"):
            products[node.name.partition("/MatMul")[0]] = node
    added: dict[str, list[Any]] = {}
    for module in sorted(modules):
        node = products.get(product(module).removesuffix("/MatMul"))
        if node is None:
            raise OptimizeError(f"the ONNX graph has no product of {module}, which an adapter changes")
        added[node.output[0]] = _beside(model.graph, node, module, _shape(node, sizes), dtype)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        more = added.get(node.output[0], [])
        if more:
            node.output[0] = more[-1].input[0]
        model.graph.node.extend([node, *more])
    onnx.save(model, file)
    return dtype


def _shape(node: Any, sizes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """What the product reads and makes."""
    if node.op_type == "MatMul":
        columns, rows = sizes[node.input[1]]
        return columns, rows
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return attributes["K"], attributes["N"]


def _beside(graph: Any, node: Any, module: str, shape: tuple[int, int], dtype: type[np.floating]) -> list[Any]:
    """The nodes of x A B, and of the sum with the product, which keeps its place in the graph."""
    from onnx import helper, numpy_helper

    (columns, rows), (down, up) = shape, parameters(module)
    rank = f"rank of {module}"  # one name for all would mean one rank for all
    for name, zeros, dims in ((down, (columns, 1), [columns, rank]), (up, (1, rows), [rank, rows])):
        value = numpy_helper.from_array(np.zeros(zeros, dtype), name)
        graph.initializer.append(value)
        graph.input.append(helper.make_tensor_value_info(name, value.data_type, dims))
    path, made = product(module).removesuffix("/MatMul"), node.output[0]
    return [
        helper.make_node("MatMul", [node.input[0], down], [f"{module}.lora_down"], f"{path}/lora_A/MatMul"),
        helper.make_node("MatMul", [f"{module}.lora_down", up], [f"{module}.lora_up"], f"{path}/lora_B/MatMul"),
        helper.make_node("Add", [f"{module}.without_lora", f"{module}.lora_up"], [made], f"{path}/lora/Add"),
    ]


def write(
    file: Path,
    adapter: Adapter,
    dtype: type[np.floating],
    names: Callable[[str], tuple[str, str]] = parameters,
) -> None:
    """The adapter's file; `names` are the graph's for a module's A and B."""
    import onnxruntime

    file.parent.mkdir(exist_ok=True)
    values = {}
    for module, parts in sorted(adapter.lora.items()):
        if not {"A", "B"} <= set(parts):
            raise OptimizeError(
                f"the adapter {adapter.name!r} has {', '.join(sorted(parts))} for {module}, not A and B"
            )
        pair = parts["A"].float().T, parts["B"].float().T * adapter.scale(module)
        for name, tensor in zip(names(module), pair, strict=True):
            array = np.ascontiguousarray(tensor.numpy().astype(dtype))
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(values)
    made.export_adapter(str(file))
