"""A checkpoint as a torch model that computes what the engine computes.

`opened` maps the weights from their files instead of reading them, so that a model larger than memory runs, slowly. A
layer that was quantized gets its weights back as the numbers that the engine multiplies with, and where the engine
rounds activations to 8 bits, so does it: per token, symmetric, as in vLLM's kernels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from optimize import processor
from optimize.checkpoint import experts, formats, kv_cache
from optimize.checkpoint.checkpoint import Checkpoint, Schemes
from optimize.errors import OptimizeError, Refused

FEW = 64  # rows of a product
LEFT = 1 << 27  # bytes of weights that are made before what is freed beside them is given back
SHARED = 4_000_000  # bytes of a weight that are worth a thread when few rows are multiplied with it


def settle(seed: int, device: str = "cpu") -> None:
    """The same arithmetic each time: a fixed seed, kernels that are deterministic, as many threads as cores.

    On another `device` than the CPU all tensors are made there, and a checkpoint's come there when they are read.
    """
    if device != "cpu":
        torch.set_default_device(device)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.set_num_threads(processor.threads())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads compute, of those that there are: those of a short operation wait for one another longer than it
    takes."""
    every = torch.get_num_threads()
    torch.set_num_threads(max(1, min(count, every)))
    try:
        yield
    finally:
        torch.set_num_threads(every)


def tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as it lies there now; the last one is kept, and each caller has a copy of his own."""
    return copy.copy(_tokenizer(folder, *sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())))


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, *_: tuple[str, int]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def compute_dtype(device: str = "") -> torch.dtype:
    """bfloat16 where the processor multiplies it or a GPU computes, float32 elsewhere; by default where tensors are
    made."""
    if torch.device(device or torch.get_default_device()).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if processor.multiplies_bfloat16() else torch.float32


def configured(folder: Path) -> Any:
    """The model's config, with what config.json leaves to its class."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model's modules without weights; only its computed buffers are real."""
    return skeleton_of(configured(folder), dtype)


def skeleton_of(config: Any, dtype: torch.dtype) -> nn.Module:
    """The same of a transformers' config."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.use_cache = False
    # PyTorch's own attention knows no soft cap, and leaves it out without a word; nor sinks, which is said.
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    fits = getattr(kind, "_supports_sdpa", True) and not getattr(config, "attn_logit_softcapping", None)
    attention = "sdpa" if fits else "eager"
    with torch.device("cpu"), no_init_weights(), init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(torch.get_default_device())
    return model


def opened(folder: Path, dtype: torch.dtype | None = None, rounds: bool = True, by_layer: bool = False) -> nn.Module:
    """The model in `folder`, ready to ask; with `rounds` it rounds what the engine rounds beside the weights.

    With `by_layer` a layer's weights are read when it is called and let go of afterwards, in each forward pass.
    """
    checkpoint = Checkpoint(folder)
    dtype = dtype or compute_dtype()
    model = skeleton(folder, dtype)
    scheme = Schemes(checkpoint.quantization)
    inside = f"{prefix(model)}."
    if by_layer:
        for layer in range(len(layers(model))):
            _read_when_called(model, layer, checkpoint, dtype)
    read = formats.dense(checkpoint, lambda name: not (by_layer and name.startswith(inside)))
    weights = experts.fused(_kept(read, dtype))
    if hasattr(model, "lm_head") and "embed_out.weight" in weights:  # GPT-NeoX's name on the disk
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    _fill(model, weights, folder)
    for name, module in model.named_modules():
        if rounds and isinstance(module, nn.Linear) and scheme.rounds_activations(name):
            module.register_forward_pre_hook(rounding(scheme.of(name) or {}, _global_scale(checkpoint, name)))
    if rounds and scheme.kv_cache is not None:
        kv_cache.rounded(
            model,
            {name: float(checkpoint.tensor(name)) for name in checkpoint.entries if name.endswith(kv_cache.SCALES)},
        )
    if dtype is torch.bfloat16 and processor.has_tiles() and torch.get_default_device().type == "cpu":
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _Tiled
    model.requires_grad_(False)
    return model.eval()


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Put the weights into the modules that config.json makes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, weight in weights.items():
        if shapes.get(name, weight.shape) != weight.shape:
            raise Refused(
                f"{folder} does not fit its config.json: {name} is {list(weight.shape)}, and {list(shapes[name])} there"
            )
    _, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left or unexpected:
        raise Refused(
            f"{folder} does not fit its config.json: {(left or unexpected)[0]} is {'missing' if left else 'extra'}"
        )


def _kept(read: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights by their names. What making each of them took lies between them, and is given back by and by: the
    allocator would keep a quarter more than the weights have."""
    weights: dict[str, torch.Tensor] = {}
    made = 0
    for name, tensor in read:
        weights[name] = tensor.to(dtype)
        made += weights[name].nbytes
        if made >= LEFT:
            processor.release()
            made = 0
    return weights


class _Tiled(nn.Linear):
    """With AMX a product with few rows takes half the time when the weight is its left side, which is not laid out anew
    then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if len(rows) > FEW:
            return super().forward(x)
        made = torch.mm(self.weight, rows.T).T.contiguous().view(*x.shape[:-1], -1)
        return made if self.bias is None else made + self.bias


def _read_when_called(model: nn.Module, at: int, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """One layer's weights come from the disk before each call, and go after it."""
    layer, inside = layers(model)[at], f"{prefix(model)}.{at}."
    # Adapters that are put around a module leave the module itself as it is.
    owners = {f"{name}.{part}": module for name, module in layer.named_modules() for part in module._parameters}
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    names = [name for name in owners if name in shapes]
    buffers = {
        f"{name}.{part}".lstrip("."): (module, part)
        for name, module in layer.named_modules()
        for part in module._buffers
        if part not in module._non_persistent_buffers_set
    }

    def put(name: str, weight: torch.Tensor) -> None:
        setattr(owners[name], name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))

    def read() -> None:
        parts = formats.dense(checkpoint, lambda name: name.startswith(inside))
        fused = experts.fused({name: weight.to(dtype) for name, weight in parts})
        weights = {name.removeprefix(inside): weight for name, weight in fused.items()}
        if different := (set(weights) - set(buffers)) ^ set(names):
            raise Refused(f"{checkpoint.folder} does not fit its config.json: look at {inside}{sorted(different)[0]}")
        for name, weight in weights.items():
            if name in buffers:  # such as a layer's scalar: small, it stays
                module, part = buffers[name]
                module._buffers[part] = weight
            else:
                put(name, weight)

    def free() -> None:
        for name in names:
            put(name, torch.zeros((), dtype=dtype).expand(shapes[name]))

    on_disk = _OnDisk(read, free)
    _ON_DISK[layer] = on_disk
    layer.register_forward_pre_hook(lambda *_: None if on_disk.held else read())
    layer.register_forward_hook(lambda *_: None if on_disk.held else free())
    free()


@dataclass(slots=True)
class _OnDisk:
    """How a layer's weights come and go, and whether they stay for now."""

    read: Callable[[], None]
    free: Callable[[], None]
    held: bool = False


_ON_DISK: WeakKeyDictionary[nn.Module, _OnDisk] = WeakKeyDictionary()


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """The weights of a layer that are read when it is called stay meanwhile, for many calls."""
    on_disk = _ON_DISK.get(layer)
    if on_disk is None:
        yield
        return
    on_disk.read()
    on_disk.held = True
    try:
        yield
    finally:
        on_disk.held = False
        on_disk.free()


def round_activations(x: torch.Tensor, float8: bool = False) -> torch.Tensor:
    """Per token, symmetric: what the engine's dynamic activation quantization does to a layer's input."""
    wide = x.float()
    limit = 448.0 if float8 else 127.0
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-8) / limit
    steps = wide / scale
    near = steps.to(torch.float8_e4m3fn).float() if float8 else steps.round_().clamp_(-128, 127)
    return near.mul_(scale).to(x.dtype)


def rounding(group: dict[str, Any], global_scale: torch.Tensor | None = None) -> Any:
    """A hook that rounds a layer's input as the config group says that the engine does."""
    args = group["input_activations"]
    if args["strategy"] == "token":
        float8 = args["type"] == "float"
        return lambda _, inputs: (round_activations(inputs[0], float8), *inputs[1:])
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    made = QuantizationArgs.model_validate(args)

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0].float()
        scale, zero = compute_dynamic_scales_and_zp(x, made, module, global_scale=global_scale)
        return (fake_quantize(x, scale, zero, made, global_scale=global_scale).to(inputs[0].dtype), *inputs[1:])

    return hook


def _global_scale(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    scale_name = f"{name}.input_global_scale"
    return checkpoint.tensor(scale_name) if scale_name in checkpoint.entries else None


@contextmanager
def adapted(model: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """`model` with the adapter in `folder`, through PEFT; without it again afterwards."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError) as error:
        raise OptimizeError(
            f"PEFT does not load the adapter in {folder}: {' '.join(str(error).split())[:300]}"
        ) from error
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the first list that is as long as the config says, or the longest."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise Refused("the model has no list of layers; only decoder models are taken")
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return next((decoder for decoder in lists if len(decoder) == count), max(lists, key=len))


def prefix(model: nn.Module) -> str:
    """The name of the list of layers, such as `model.layers`."""
    decoder = layers(model)
    return next(name for name, module in model.named_modules() if module is decoder)


Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with beside the hidden states


@dataclass(frozen=True, slots=True)
class Entered:
    """Hidden states (rows, tokens, hidden), a batch each, and how each layer is called there: its own rope and mask."""

    states: list[torch.Tensor]
    calls: list[dict[int, Call]]  # by the id of the layer

    def lent(self, some: Sequence[nn.Module], of: Sequence[nn.Module]) -> Entered:
        """The same for `some` layers, each called as the one of `of` in its place."""
        pairs = [(id(layer), id(other)) for layer, other in zip(some, of, strict=True)]
        return Entered(self.states, [{layer: calls[other] for layer, other in pairs} for calls in self.calls])


def entered(model: nn.Module, ids: torch.Tensor, batch: int) -> Entered:
    """What the model's layers are called with for `ids` (rows, tokens), `batch` rows at a time; none of them runs."""
    states: list[torch.Tensor] = []
    calls: list[dict[int, Call]] = []

    def pass_by(layer: nn.Module, state: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if not calls[-1]:
            states.append(state)
        named = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "past_key_value")}
        calls[-1][id(layer)] = args, named
        if layer is last:
            raise _Stop
        return state

    last = layers(model)[-1]
    with _replaced(model, pass_by):
        for rows in ids.split(batch):
            calls.append({})
            try:
                with torch.no_grad():
                    model(input_ids=rows, use_cache=False)
            except _Stop:
                pass
    return Entered(states, calls)


def through(some: Sequence[nn.Module], begin: Entered) -> Entered:
    """The hidden states after `some` layers, one after another."""
    made = []
    for state, calls in zip(begin.states, begin.calls, strict=True):
        for layer in some:
            state = forward(layer, state, calls[id(layer)])
        made.append(state)
    return Entered(made, begin.calls)


@torch.inference_mode()
def last_states(model: nn.Module, rows: Sequence[torch.Tensor], done: Callable[[int], None]) -> list[torch.Tensor]:
    """What the last layer gives for each of `rows` (1, tokens), for `answered`; each layer goes over all of them before
    the next one is read. `done` hears how many have."""
    parts = [entered(model, row, 1) for row in rows]
    begun = Entered([part.states[0] for part in parts], [part.calls[0] for part in parts])
    for count, layer in enumerate(layers(model), 1):
        with held(layer):
            begun = through([layer], begun)
        done(count)
    return begun.states


def forward(layer: nn.Module, state: torch.Tensor, call: Call) -> torch.Tensor:
    args, kwargs = call
    out = layer(state, *args, **kwargs)
    made: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return made


def answered(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Logits (rows, tokens, vocabulary) of what the last layer gives, by the model's own norm, output layer, scaling
    and soft caps."""
    nothing = torch.zeros(states.shape[:2], dtype=torch.long)
    with _replaced(model, lambda *_: states):
        made: torch.Tensor = model(input_ids=nothing, use_cache=False).logits
    return made


@contextmanager
def _replaced(model: nn.Module, instead: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The model's layers do `instead(layer, states, args, kwargs)`."""

    def by(layer: nn.Module) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            state, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            return instead(layer, state, args, kwargs)

        return call

    some = list(layers(model))
    unread = [on_disk for layer in some if (on_disk := _ON_DISK.get(layer)) and not on_disk.held]
    for layer in some:
        layer.forward = by(layer)
    for on_disk in unread:
        on_disk.held = True  # nothing is read for a layer that does not run
    try:
        yield
    finally:
        for on_disk in unread:
            on_disk.held = False
        for layer in some:
            del layer.forward


class _Stop(Exception):
    """What the layers are called with is known; the rest of the forward pass is not needed."""


@torch.inference_mode()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, vocabulary) in float32."""
    made: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return made.float()


def for_few_rows(model: nn.Module) -> int:
    """Threads for products with few rows, which read a layer's weights one after another."""
    return max(weight.numel() * weight.element_size() for weight in layers(model).parameters()) // SHARED


@torch.inference_mode()
def greedy(model: nn.Module, prompts: Sequence[list[int]], count: int, end: int | None) -> list[list[int]]:
    """The `count` likeliest tokens one after another behind each prompt, or fewer where `end` comes, with a cache of
    keys and values, for all prompts at once: most of a token's time goes into reading the weights."""
    from transformers import GenerationConfig

    if len(prompts) > 1 and getattr(model, "_is_stateful", False):  # what is before a prompt would reach its state
        return [greedy(model, [prompt], count, end)[0] for prompt in prompts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = GenerationConfig(
        max_new_tokens=count, do_sample=False, use_cache=True, eos_token_id=end, pad_token_id=end or 0
    )
    able: Any = model
    # The last token's logits alone would be made with a copy of the output layer for each prompt.
    every = {"logits_to_keep": 0} if able._supports_logits_to_keep() else {}
    with threads(for_few_rows(model)):
        made = able.generate(input_ids=ids, attention_mask=mask, generation_config=how, **every)
    answers = made[:, longest:].tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]
