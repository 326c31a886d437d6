"""Matrices of an ONNX graph in few bits, a scale for every 32 weights, by ONNX Runtime's own weight quantizer.

A matrix that is multiplied with becomes MatMulNBits, a table of tokens GatherBlockQuantized. The table and the output
layer have 8 bits always: they are asked for each token, and 4 bits cost more there than they save. Numbers that several
of them have, as a table that is the output layer too, are in the file once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optimize.export.rules import HELD

BLOCK = 32  # weights that share a scale
DOMAIN = "com.microsoft"
TABLE_BITS = 8
Put = Callable[..., Any]  # writes numbers: `put(name, kind, shape, parts)` gives the tensor that says where they are


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix of the graph, and what reads it."""

    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]


def parts(weight: torch.Tensor, across: int) -> Iterator[torch.Tensor]:
    """The weight in fp32, some of its rows (0) or columns (1) at a time."""
    for part in weight.split(max(1, HELD * weight.shape[across] // weight.numel()), across):
        yield part.float().contiguous()


def rounded(graph: Any, turned: Mapping[str, str], weights: Mapping[str, Weight], bits: int, put: Put) -> list[Any]:
    """The graph's nodes, with products and tables of tokens in few bits, whose numbers `put` writes; `turned` are the
    names of matrices that are turned around first, with those of the matrices."""
    tables = {node.input[0] for node in graph.node if _looks_up_tokens(node, weights)}
    tokens = {weights[name].shape[0] for name in tables}
    once = _Once(graph, put)
    nodes = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            nodes.append(_table(node, weights[node.input[0]], once))
        elif node.op_type == "MatMul" and turned.get(node.input[1], node.input[1]) in weights:
            weight = weights[turned.get(node.input[1], node.input[1])].read()
            rows = weight if node.input[1] in turned else weight.T  # (out, in)
            nodes.append(_product(node, rows, TABLE_BITS if len(rows) in tokens else bits, once))
        else:
            nodes.append(node)
    return nodes


def _looks_up_tokens(node: Any, weights: Mapping[str, Weight]) -> bool:
    if node.op_type != "Gather" or node.input[0] not in weights or node.input[1] != "input_ids":
        return False
    return all(item.i == 0 for item in node.attribute) and weights[node.input[0]].shape[1] % BLOCK == 0


def _table(node: Any, weight: Weight, once: _Once) -> Any:
    from onnx import helper

    packed, scales = _blocks(weight.read(), TABLE_BITS)
    name = node.input[0]
    integers = once(f"{name}_table_Q{TABLE_BITS}", packed, weight.shape)
    return helper.make_node(
        "GatherBlockQuantized", [integers, node.input[1], once(f"{name}_table_scales", scales, scales.shape)],
        list(node.output), f"{node.name}_Q{TABLE_BITS}", domain=DOMAIN, bits=TABLE_BITS, block_size=BLOCK,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _product(node: Any, weight: torch.Tensor, bits: int, once: _Once) -> Any:
    """The product with `weight` (out, in); what it is multiplied with is rounded to 8 bits, a block at a time."""
    from onnx import helper

    packed, scales = _blocks(weight, bits)
    name, (columns, width) = node.input[1], weight.shape
    integers = once(f"{name}_Q{bits}", packed, packed.shape)
    return helper.make_node(
        "MatMulNBits", [node.input[0], integers, once(f"{name}_scales", scales, scales.shape)], list(node.output),
        f"{node.name}_Q{bits}", domain=DOMAIN, K=width, N=columns, bits=bits, block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip


def product(weight: torch.Tensor, bits: int) -> bytes:
    """A graph that multiplies `x` (rows, in) with a matrix (out, in) of so many bits alone, or of fp32 for 0."""
    from onnx import TensorProto, helper

    def put(name: str, kind: int, shape: tuple[int, ...], held: list[torch.Tensor]) -> Any:
        return helper.make_tensor(name, kind, shape, held[0].numpy().tobytes(), raw=True)

    columns, width = weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, columns])
    graph = helper.make_graph([], "product", [x], [y], [])
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    if bits:
        node = _product(node, weight, bits, _Once(graph, put))
    else:
        graph.initializer.append(put("weight", TensorProto.FLOAT, (width, columns), [weight.T.contiguous()]))
    graph.node.append(node)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()


def _blocks(weight: torch.Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers (out, blocks, bytes) and scales (out, blocks) of a matrix (out, in)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)
    pairs = [quantizer.qbits_block_quant(part.T.contiguous().numpy())[:2] for part in parts(weight, 0)]
    packed, scales = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
    return packed, scales


class _Once:
    """Numbers in the file, by name and shape; the same numbers again are those that are there."""

    def __init__(self, graph: Any, put: Put) -> None:
        self._graph = graph
        self._put = put
        self._there: dict[bytes, Any] = {}

    def __call__(self, name: str, numbers: np.ndarray, shape: tuple[int, ...]) -> str:
        from onnx import TensorProto

        digest = hashlib.sha256(np.ascontiguousarray(numbers)).digest()
        tensor = TensorProto()
        if digest in self._there:
            tensor.CopyFrom(self._there[digest])
            tensor.name = name
            del tensor.dims[:]
            tensor.dims.extend(shape)
        else:
            kind = TensorProto.UINT8 if numbers.dtype == np.uint8 else TensorProto.FLOAT
            tensor = self._there[digest] = self._put(name, kind, shape, [torch.from_numpy(numbers)])
        if name not in {item.name for item in self._graph.initializer}:  # of a matrix that is multiplied with twice
            self._graph.initializer.append(tensor)
        return name
