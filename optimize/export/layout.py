"""An ONNX export as optimum lays it out, for `ORTModelForCausalLM.from_pretrained` and `pipeline`.

`model.onnx` reads `past_key_values.N.key` and writes `present.N.key`; beside it lie `config.json`,
`generation_config.json` and the tokenizer in the form that transformers 4 and 5 read, and `ort_config.json`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimize.checkpoint.checkpoint import copy_side_files

CACHE = re.compile(r"(input\.|output\.)past_key_values\.layers\.(\d+)\.(key|value)s")
SCOPES = "pkg.torch.onnx.name_scopes"
TOKENIZER = "tokenizer_config.json"
# Rope's fields that transformers 4 wants beside `rope_scaling`, not in it.
OUTSIDE_SCALING = ("rope_theta", "partial_rotary_factor")
# Families of which optimum's class takes num_key_value_heads from the config, and head_dim (optimum-onnx 0.1.0).
GROUPED = frozenset((
    "arcee", "cohere", "gemma", "gemma3_text", "glm", "granite", "gpt_oss", "helium", "mistral", "llama", "nemotron",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
))  # fmt: skip
WIDE = frozenset(("gemma", "gemma3_text", "gpt_oss", "nemotron"))


def named(file: Path) -> None:
    """The graph that transformers wrote, with optimum's names; its weights stay where they are."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    names = {}
    for item in (*graph.input, *graph.output):
        if match := CACHE.fullmatch(item.name):
            side = "past_key_values" if match[1] == "input." else "present"
            names[item.name] = item.name = f"{side}.{match[2]}.{match[3]}"
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        _placed(node)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for item in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph, model):
        del item.metadata_props[:]  # the exporter's own folders, and source lines
    onnx.save(model, file)


def _placed(node: Any) -> None:
    """A linear layer's product gets the name that optimum's exporter gives it."""
    if node.op_type in ("MatMul", "Gemm"):
        scopes = next((item.value for item in node.metadata_props if item.key == SCOPES), "[]")
        module, operation = ["", "", *map(str, ast.literal_eval(scopes))][-2:]
        if operation.startswith("linear"):
            node.name = product(module)


def product(module: str) -> str:
    """/model/layers.0/self_attn/q_proj/MatMul: the product of a module's weight."""
    path = re.sub(r"\.(?!\d)", "/", module)
    return f"/{path}/MatMul"


def any_empty_cache(file: Path, config: Mapping[str, Any]) -> None:
    """An empty cache is taken in any shape, where optimum's class makes it in another than the model's.

    It takes hidden_size / num_attention_heads for the width of a head, and all heads for those of keys and values, of
    most families. A cache of no tokens has no numbers, so it has any shape that one asks for.
    """
    import onnx
    from onnx import TensorProto, helper

    kind, heads = config.get("model_type"), int(config["num_attention_heads"])
    width = int(config["hidden_size"]) // heads
    shape = (int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or width))
    theirs = (shape[0] if kind in GROUPED else heads, shape[1] if kind in WIDE else width)
    if theirs == shape:
        return
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    inputs = [item for item in graph.input if item.name.startswith("past_key_values.")]
    constants = {f"cache.{name}": [size] for name, size in zip(("heads", "width"), shape, strict=True)}
    graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, [1], of) for name, of in constants.items())
    nodes = [
        helper.make_node("Shape", [inputs[0].name], ["cache.rows"], "/cache/rows", start=0, end=1),
        helper.make_node("Shape", [inputs[0].name], ["cache.tokens"], "/cache/tokens", start=2, end=3),
        helper.make_node(
            "Concat", ["cache.rows", "cache.heads", "cache.tokens", "cache.width"], ["cache.shape"], "/cache/shape",
            axis=0,
        ),
    ]  # fmt: skip
    for item in inputs:
        dims = item.type.tensor_type.shape.dim
        dims[1].dim_param, dims[3].dim_param = "heads_of_cache", "width_of_cache"
        reshaped = f"{item.name}.reshaped"
        for node in graph.node:
            node.input[:] = [reshaped if name == item.name else name for name in node.input]
        nodes.append(
            helper.make_node("Reshape", [item.name, "cache.shape"], [reshaped], f"/cache/{item.name}", allowzero=1)
        )
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    onnx.save(model, file)


def side_files(source: Path, folder: Path, precision: str) -> None:
    """What lies beside the graph."""
    copy_side_files(source, folder)
    config = json.loads((source / "config.json").read_text())
    _write(folder / "config.json", legacy(config))
    if (folder / TOKENIZER).is_file():
        _write(folder / TOKENIZER, legacy_tokenizer(json.loads((folder / TOKENIZER).read_text())))
    if not (folder / "generation_config.json").is_file():
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        _write(folder / "generation_config.json", {"_from_model_config": True, **ends})
    files = list(folder.glob("model.onnx*"))
    _write(
        folder / "ort_config.json",
        {
            "one_external_file": True, "opset": None, "optimization": {}, "quantization": {}, "optimum_version": None,
            "transformers_version": version("transformers"), "use_external_data_format": len(files) > 1,
            "loradock_precision": precision,
        },
    )  # fmt: skip


def legacy(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 reads it, which knows no `rope_parameters`; 5 reads it too."""
    made = {name: value for name, value in config.items() if name != "rope_parameters"}
    rope = config.get("rope_parameters")
    if not rope:
        return made
    if "full_attention" in rope:  # a rope of their own for layers with a window
        made["rope_local_base_freq"] = rope.get("sliding_attention", rope["full_attention"])["rope_theta"]
        rope = rope["full_attention"]
    made |= {name: rope[name] for name in OUTSIDE_SCALING if name in rope}
    kind = rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in OUTSIDE_SCALING}
    if config.get("model_type") == "phi3":  # takes these three and no other
        made["original_max_position_embeddings"] = longest(config) or config.get("original_max_position_embeddings")
        scaling = {"type": kind, **{name: rope[name] for name in ("short_factor", "long_factor") if name in rope}}
    made["rope_scaling"] = scaling if kind != "default" else None
    return made


def rope_type(config: Mapping[str, Any]) -> str:
    """How the model's rope changes with the position; "" for a rope of their own for some layers."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "")


def longest(config: Mapping[str, Any]) -> int | None:
    """How many tokens a graph is right for: longrope has other factors beyond them. None where there is no such end."""
    if rope_type(config) != "longrope":
        return None
    rope = config.get("rope_parameters") or config["rope_scaling"]
    return int(rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"])


def legacy_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the class's name that transformers 4 has, and 5 too."""
    made = dict(config)
    if made.get("tokenizer_class") == "TokenizersBackend":
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(more := made.get("extra_special_tokens"), list):
        del made["extra_special_tokens"]
        made["additional_special_tokens"] = [*made.get("additional_special_tokens", []), *more]
    return made


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
