"""What an adapter brings beside its LoRA: an embedding, output layer or head as a whole, or the rows of single tokens.

PEFT saves a module of `modules_to_save` whole, as it does an embedding that was resized, and of
`trainable_token_indices` the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve.adapters.module_names import PREFIX
from serve.adapters.tensors import FLOATS, Tensor
from serve.names import shown

MERGE = "merge it into its base with `loradock optimize` and serve the result"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
OUTPUT = "lm_head"
HEADS = ("score", "classifier")
WHOLE, BIAS = ".weight", ".bias"
ROWS = ".token_adapter.trainable_tokens_delta"
# How PEFT calls a table that was resized and below the rows that were trained.
BELOW = ".token_adapter.base_layer.weight"
# Tokens that adapters may have beyond the base's vocabulary.
MAX_BEYOND = 1024
# Labels of a head, whose scores the engine tells as it tells log-probabilities.
MAX_LABELS = 127
MAX_LABEL = 128

# (module, WHOLE, BIAS or ROWS) -> its tensor.
Saved = dict[tuple[str, str], Tensor]


@dataclass(frozen=True, slots=True)
class Head:
    """A head that classifies; its labels are `independent`, or one of them is right."""

    labels: tuple[str, ...]
    independent: bool


def saved_module(name: str) -> tuple[str, str] | None:
    """(module, WHOLE, BIAS or ROWS) of a tensor's name; None for one of another kind."""
    for ending in (ROWS, BELOW, WHOLE, BIAS):
        module = name.removeprefix(PREFIX).removesuffix(ending)
        last = module.rpartition(".")[2]
        known = last in (*EMBEDDINGS, OUTPUT) if ending != BIAS else False
        if name.endswith(ending) and (known or (last in HEADS and ending in (WHOLE, BIAS))):
            return module, WHOLE if ending == BELOW else ending
    return None


def head_of(tensors: Iterable[Tensor], settings: Mapping[str, Any]) -> Head | None:
    """The head among an adapter's tensors. PEFT saves no names: `id2label` and `problem_type` may be added."""
    places = ((saved_module(tensor.name), tensor) for tensor in tensors)
    weights = (tensor for place, tensor in places if place and is_head(place[0]) and place[1] == WHOLE)
    weight = next(weights, None)
    if weight is None:
        return None
    names = settings.get("id2label") or {}
    labels = tuple(names.get(str(number), f"LABEL_{number}") for number in range(weight.shape[0]))
    return Head(labels, len(labels) == 1 or settings.get("problem_type") == "multi_label_classification")


def rows_of(tensors: Iterable[Tensor], settings: Mapping[str, Any]) -> int:
    """Of how many tokens an adapter's embeddings have rows at most; 0 without one."""
    rows = 0
    for tensor in tensors:
        place = saved_module(tensor.name)
        if place is None or place[0].rpartition(".")[2] not in EMBEDDINGS or len(tensor.shape) != 2:
            continue
        tokens = token_indices(settings, place[0]) or [] if place[1] == ROWS else [tensor.shape[0] - 1]
        rows = max(rows, *(token + 1 for token in tokens), 0)
    return rows


def token_indices(settings: Mapping[str, Any], module: str) -> list[int] | None:
    """The tokens whose rows of a module were trained; None for a module that has none."""
    indices = settings.get("trainable_token_indices")
    if isinstance(indices, dict):
        names = (name for name in indices if module == name or module.endswith(f".{name}"))
        return next((indices[name] for name in names), None)
    return indices if indices and module.rpartition(".")[2] in EMBEDDINGS else None


def setting_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the types of the settings that name saved modules."""
    saved = raw.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        yield f"modules_to_save is {shown(saved)}; it must be a list of module names"
    indices = raw.get("trainable_token_indices")
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    if indices is not None and not all(isinstance(tokens, list) and all(map(_is_token, tokens)) for tokens in lists):
        yield f"trainable_token_indices is {shown(indices)}; it must be a list of token numbers, or one for each module"
    labels = raw.get("id2label")
    if labels is not None and not (isinstance(labels, dict) and len(labels) <= MAX_LABELS and _are_labels(labels)):
        yield (
            f"id2label is {shown(labels)}; it must map up to {MAX_LABELS} numbers to different printable names of "
            f"up to {MAX_LABEL} characters"
        )
    if not isinstance(raw.get("problem_type"), str | None):
        yield f"problem_type is {shown(raw['problem_type'])}; it must be a text"
    if not isinstance(raw.get("ensure_weight_tying"), bool | None):
        yield f"ensure_weight_tying is {shown(raw['ensure_weight_tying'])}; it must be true or false"


def served_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Saved modules that are not served beside other adapters."""
    served = (*EMBEDDINGS, OUTPUT, *HEADS)
    names = [name for name in raw.get("modules_to_save") or () if name.rpartition(".")[2] not in served]
    if names:
        yield (
            f"it replaces whole modules (modules_to_save: {shown(names)}), of which embeddings, output layers and "
            "classification heads (score, classifier) alone are served: a norm or a layer of its own would cost a step "
            f"the same work once more for every adapter in it; {MERGE}"
        )


def saved_problems(
    saved: Saved, raw: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], adapted: Mapping[str, Any]
) -> Iterator[str]:
    """What does not fit of the tensors that were saved; `adapted` has the modules with a LoRA."""
    heads = {module for module, ending in saved if is_head(module) and ending == WHOLE}
    if len(heads) > 1 or any(is_head(module) and module not in heads for module, _ in saved):
        yield f"it has {len(heads)} classification heads with a weight; one is served"
    for name in raw.get("modules_to_save") or ():
        if is_head(name) and heads:
            continue  # PEFT names both that a model may have
        if not any(module == name or module.endswith(f".{name}") for module, ending in saved if ending == WHOLE):
            yield f"modules_to_save names `{shown(name)}`, and the file has no weight of it; save the adapter again"
    trained = {module for module, ending in saved if ending == ROWS}
    if raw.get("trainable_token_indices") and not trained:
        yield "trainable_token_indices is set, and the file has no rows of tokens; save the adapter again"
    for (module, ending), tensor in saved.items():
        if tensor.dtype not in FLOATS:
            yield f"`{shown(tensor.name)}` is {tensor.dtype}; save the adapter as BF16, F16 or F32"
        if module in adapted or (ending == WHOLE and module in trained and not tensor.name.endswith(BELOW)):
            yield f"`{shown(module)}` is adapted in two ways at a time; {MERGE}"
        yield from _shape_problems(module, ending, tensor, raw, modules)
        weight = saved.get((module, WHOLE))
        if ending == BIAS and weight and tensor.shape != weight.shape[:1]:
            yield f"`{shown(tensor.name)}` is {list(tensor.shape)}, and its weight {list(weight.shape)}"


def _shape_problems(
    module: str, ending: str, tensor: Tensor, raw: Mapping[str, Any], modules: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    name, shape = shown(tensor.name), list(tensor.shape)
    if is_head(module):
        yield from _head_problems(name, ending, shape)
        return
    last = module.rpartition(".")[2]
    sizes = modules.get(module)
    if sizes is None and any(each.rpartition(".")[2] == last for each in modules):
        yield f"`{name}` fits no module of the base"
        return
    if len(shape) != 2:
        yield f"`{name}` is {shape}; it must have a row for each token"
        return
    # Of a base whose tables take no LoRA the engine knows the sizes.
    vocabulary, width = sizes or (None, None)
    if sizes is not None and last in EMBEDDINGS:
        width, vocabulary = sizes
    if width is not None and shape[1] != width:
        yield f"`{name}` is {shape}; the base wants {width} columns"
    if ending == WHOLE:
        yield from _row_problems(name, shape[0], vocabulary)
        return
    tokens = token_indices(raw, module)
    if tokens is None or len(tokens) != shape[0] or len(set(tokens)) != len(tokens):
        count = "no" if tokens is None else len(set(tokens))
        yield f"`{name}` has {shape[0]} rows, and trainable_token_indices names {count} tokens of it"
    elif vocabulary is not None and max(tokens, default=0) >= vocabulary + MAX_BEYOND:
        yield f"trainable_token_indices names token {max(tokens)}, and {_beyond(vocabulary)}"


def _head_problems(name: str, ending: str, shape: list[int]) -> Iterator[str]:
    if len(shape) != (2 if ending == WHOLE else 1) or not shape[0]:
        yield f"`{name}` is {shape}; it must have a row for each label"
    elif shape[0] > MAX_LABELS:
        yield f"`{name}` has {shape[0]} labels; up to {MAX_LABELS} are served: train with fewer, or serve a whole model"


def is_head(module: str) -> bool:
    """Whether a module is called as heads that classify are."""
    return module.rpartition(".")[2] in HEADS


def _are_labels(labels: Mapping[str, Any]) -> bool:
    names = list(labels.values())
    sound = all(isinstance(name, str) and 0 < len(name) <= MAX_LABEL and name.isprintable() for name in names)
    return sound and len(set(names)) == len(names)


def _beyond(vocabulary: int) -> str:
    return f"the base has {vocabulary}: at most {MAX_BEYOND} beyond those are served beside other adapters; {MERGE}"


def _row_problems(name: str, rows: int, vocabulary: int | None) -> Iterator[str]:
    if vocabulary is not None and rows > vocabulary + MAX_BEYOND:
        yield f"`{name}` has {rows} rows, and {_beyond(vocabulary)}"
    elif vocabulary is not None and rows < vocabulary:
        yield f"`{name}` has {rows} rows, and the base {vocabulary}: it was trained on another vocabulary"


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31
