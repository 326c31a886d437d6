"""A dense decoder's whole step in one call of `step.cpp`, in place of vLLM's layer by layer.

vLLM schedules, keeps the paged cache and samples; only its forward pass is replaced, and its output layer. The
functions at the end take the place of vLLM's (`patches.STEP`): a second copy of each linear layer's weights is packed
as they are loaded, and the model runner asks a `Fused` first. What that does not know goes vLLM's way: at the load,
with a line in the log, for a kind of model; in a step, silently, for a kind of step.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.worker.block_table import SlotMappingMode

from serve.cpu_kernels import eight_bits, packing
from serve.cpu_kernels.build import library
from serve.cpu_kernels.operators import Layer
from serve.cpu_kernels.packing import at as _at

log = logging.getLogger("loradock")

MODELS = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
FEW = 64  # tokens whose slots are sooner computed here than other threads wake up


class Unknown(Exception):
    """Why this model goes vLLM's way, in words."""


class Fused:
    """One loaded model, as the kernels know it."""

    def __init__(self, runner: Any) -> None:
        config, model = runner.vllm_config, runner.get_model()
        _check_engine(config, model)
        _check_layers(model.model)
        _check_output(model)
        kernels = library()
        assert kernels is not None
        self.kernels = kernels
        inner = model.model
        embedding, head = _bare(inner.embed_tokens), _bare(model.lm_head)
        first = inner.layers[0].self_attn
        rope = first.rotary_emb
        cos_sin = rope.cos_sin_cache = rope.cos_sin_cache.to(torch.bfloat16)
        self.hidden = int(inner.config.hidden_size)
        self.keep = [embedding.weight, cos_sin, inner.norm.weight]
        self.number = kernels.loradock_decoder(
            self.hidden,
            first.num_heads,
            first.num_kv_heads,
            first.head_dim,
            _bare(inner.layers[0].mlp.down_proj).input_size,
            rope.rotary_dim,
            ctypes.c_float(inner.norm.variance_epsilon),
            ctypes.c_float(first.scaling),
            *(_at(tensor) for tensor in self.keep),
        )
        if self.number < 0:
            raise Unknown("its sizes are no multiples of 16, or its heads are not of 32, 64, 96 or 128")
        self.formats: set[str] = set()
        for layer in inner.layers:
            self._add(layer)
        self.attention = [layer.self_attn.attn for layer in inner.layers]
        self.bound = 0
        # Prompts: with tile instructions vLLM's matrix products are several times faster than dot products.
        self.most = 64 if torch.cpu._is_amx_tile_supported() else 1 << 30
        kind = packing.head_kind()
        self.head = packing.matrix(head.weight, kind)
        of_head = packing.words(kind, self.head) if self.head >= 0 else "bfloat16"
        # The formats that are multiplied, for those who operate the server.
        self.weights = f"{', '.join(sorted(self.formats))}; output layer {of_head}"
        # The head's further rows are padding.
        self.vocabulary = int(model.logits_processor.org_vocab_size)
        self.kernels.loradock_decoder_head(self.number, self.head, self.vocabulary)
        self.ready: torch.Tensor | None = None  # the logits of the step that was just computed
        # Adapters of the embedding and the output layer are vLLM's: so are the steps, or logits, of tokens with one.
        self.embeds, self.heads = _adapted(inner.embed_tokens), _adapted(model.logits_processor)

    def _add(self, layer: Any) -> None:
        modules = [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
        matrices, loras = [], []
        for module in modules:
            bare = _bare(module)
            matrix = getattr(bare, "loradock_matrix", -1)
            if matrix < 0:
                reason = getattr(bare, "loradock_refused", "its format is not known")
                raise Unknown(f"{getattr(bare, 'prefix', 'a layer')}: {reason}")
            matrices.append(matrix)
            self.formats.add(bare.loradock_weights)
            if not isinstance(module, BaseLayerWithLoRA):
                loras.append(-1)
            elif hasattr(module.punica_wrapper, "layer") and module.lora_b_stacked[0].dtype == torch.bfloat16:
                loras.append(module.punica_wrapper.number)
            else:
                raise Unknown("its adapters are vLLM's own path's, or not bfloat16")
        if any(
            size % 16 for module in modules if isinstance(module, BaseLayerWithLoRA) for size in module.output_slices
        ):
            raise Unknown("its sizes are no multiples of 16")
        weights = [norm.weight if norm is not None else None for norm in _norms(layer)]
        self.keep += [weight for weight in weights if weight is not None]
        self.kernels.loradock_decoder_layer(
            self.number, (ctypes.c_int * 4)(*matrices), (ctypes.c_int * 4)(*loras), *map(_at, weights)
        )

    def step(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """The model's output, (tokens, hidden) in bfloat16, normalized; None for a step that vLLM has to do."""
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):
            return None
        meta = context.attn_metadata[self.attention[0].layer_name]
        rows = ids.shape[0]
        if (
            rows > self.most
            or rows != meta.num_actual_tokens
            or meta.causal is not True
            or (self.embeds is not None and self.embeds.touched())
            or not self._bind()
        ):
            return None
        if context.attn_metadata[self.attention[-1].layer_name] is not meta:
            return None
        out = torch.empty((rows, self.hidden), dtype=torch.bfloat16)
        table, requests = meta.block_table, meta.seq_lens.shape[0]
        # Where each request has one token, vLLM asks for all of their logits next.
        ahead = rows == requests and self.head >= 0 and not self._heads_touched()
        self.ready = torch.empty((rows, self.vocabulary), dtype=torch.float32) if ahead else None
        refused = self.kernels.loradock_step(
            self.number,
            _at(ids),
            _at(positions),
            _at(meta.slot_mapping),
            rows,
            _at(meta.query_start_loc),
            _at(table),
            ctypes.c_int64(table.stride(0)),
            requests,
            _at(out),
            _at(self.ready),
        )
        if refused:
            self.ready = None
            return None
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(rows, vocabulary) in float32, not rounded on the way; None where vLLM has to compute them."""
        if self.head < 0 or self._heads_touched():
            return None
        out = torch.empty((hidden.shape[0], self.vocabulary), dtype=torch.float32)
        self.kernels.loradock_logits(
            self.head,
            _at(hidden),
            ctypes.c_int64(hidden.stride(0)),
            hidden.shape[0],
            _at(out),
            ctypes.c_int64(out.stride(0)),
            self.vocabulary,
        )
        return out

    def _heads_touched(self) -> bool:
        return self.heads is not None and self.heads.touched()

    def _bind(self) -> bool:
        """Tell the kernels where the cache is, once it is there."""
        cache = self.attention[0].kv_cache
        if cache.data_ptr() == self.bound:
            return True
        caches = [attention.kv_cache for attention in self.attention]
        if (
            any(attention.isa != "vec" for attention in self.attention)
            or cache.ndim != 4
            or cache.dtype != torch.bfloat16
        ):
            return False
        if any(other.shape != cache.shape or other.stride() != cache.stride() for other in caches):
            return False
        if cache.stride(2) != cache.shape[3] or cache.stride(3) != 1 or cache.shape[2] % 32:
            return False
        pointers = (ctypes.c_void_p * len(caches))(*(other.data_ptr() for other in caches))
        self.kernels.loradock_decoder_cache(
            self.number, pointers, cache.shape[2], ctypes.c_int64(cache.stride(0)), ctypes.c_int64(cache.stride(1))
        )
        self.bound = cache.data_ptr()
        return True


def _check_engine(config: Any, model: Any) -> None:
    parallel = config.parallel_config
    if type(model) not in MODELS:
        raise Unknown(f"{type(model).__name__} is none of {', '.join(kind.__name__ for kind in MODELS)}")
    if config.model_config.dtype != torch.bfloat16 or config.cache_config.cache_dtype not in ("auto", "bfloat16"):
        raise Unknown("weights or KV cache are not bfloat16")
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        raise Unknown("it is spread over several workers")
    if config.speculative_config is not None or config.model_config.runner_type != "generate":
        raise Unknown("it speculates, or generates nothing")


def _check_layers(inner: Any) -> None:
    for layer in inner.layers:
        rope = layer.self_attn.rotary_emb
        if type(rope).forward_cpu is not RotaryEmbedding.forward_cpu or not rope.is_neox_style:
            raise Unknown(f"of {type(rope).__name__} only the plain form is known")
        if rope is not inner.layers[0].self_attn.rotary_emb or type(layer.mlp.act_fn) is not SiluAndMul:
            raise Unknown("its layers differ, or its activation is not SiLU")
        _check_attention(layer.self_attn.attn)
        for norm in _norms(layer):
            if norm is not None:
                _check_norm(norm, inner.norm)


def _check_attention(attention: Any) -> None:
    impl = attention.impl
    plain = impl.sliding_window == -1 and impl.alibi_slopes is None and impl.sinks is None
    if not plain or impl.logits_soft_cap:
        raise Unknown("its attention is not plain")
    if attention.attn_type != "decoder" or attention.kv_sharing_target_layer_name:
        raise Unknown("its attention is not a decoder's")


def _norms(layer: Any) -> list[Any]:
    """A layer's norms, None where a model has none of its queries and keys."""
    of_heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]


def _check_norm(norm: Any, last: Any) -> None:
    if type(norm) is not RMSNorm or norm.variance_size_override or norm.weight.dtype != torch.bfloat16:
        raise Unknown("its norms are not plain")
    if norm.variance_epsilon != last.variance_epsilon:
        raise Unknown("its norms differ")


def _check_output(model: Any) -> None:
    processor, head = _bare(model.logits_processor), _bare(model.lm_head)
    if processor.soft_cap or processor.scale != 1 or getattr(head, "bias", None) is not None:
        raise Unknown("its logits are scaled or capped")
    if getattr(head, "weight", None) is None:
        raise Unknown("its output layer is quantized")
    if head.weight.dtype != torch.bfloat16 or _bare(model.model.embed_tokens).weight.dtype != torch.bfloat16:
        raise Unknown("its embedding is not bfloat16")
    if processor.org_vocab_size > head.weight.shape[0]:
        raise Unknown("its output layer has fewer rows than its vocabulary")


def _adapted(module: Any) -> Layer | None:
    """The adapters of a module that is computed by vLLM where a token has one."""
    return getattr(getattr(module, "punica_wrapper", None), "layer", None)


def _bare(module: Any) -> Any:
    """vLLM's layer below the one that adds adapters to it."""
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module


_attention = cpu_attn._get_attn_isa


def _as_vectors(*args: Any, **kwargs: Any) -> str:
    """The layout of the cache that the kernels know, also where vLLM would choose the one for tile instructions."""
    chosen = _attention(*args, **kwargs)
    return "vec" if chosen == "amx" else chosen


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Any) -> None:
    packing.floats(layer, layer.weight)
    original(method, layer)


def process_int8_weights_after_loading(original: Callable[..., None], method: Any, layer: Any) -> None:
    scale = getattr(layer, method.layer_param_names[1])
    dynamic = method.config.input_symmetric and not method.config.is_static_input_scheme
    if dynamic and scale.numel() == layer.weight.shape[0]:
        packing.channels(layer, scale.detach().float().contiguous())
    original(method, layer)


def process_float8_after_loading(original: Callable[..., None], kernel: Any, layer: Any) -> None:
    weight, scale = (getattr(layer, name) for name in kernel.layer_param_names[:2])
    # (inputs, outputs) by now; scales of blocks come to other kernels.
    if scale.numel() in (1, weight.shape[1]):
        packing.float8(layer, weight.t(), scale)
    original(kernel, layer)


def process_integers_after_loading(original: Callable[..., None], kernel: Any, layer: Any) -> None:
    packing.integers(layer, kernel)
    original(kernel, layer)


def load_model(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
    eight_bits.register()
    original(runner, *args, **kwargs)
    runner.loradock_fused = None
    try:
        fused = runner.loradock_fused = Fused(runner)
    except Unknown as reason:
        log.warning("this model runs layer by layer, not in one call a step: %s", reason)
        return
    log.info("the model runs in one call a step; its weights are %s", fused.weights)
    cpu_attn._get_attn_isa = _as_vectors
    model = runner.get_model()
    model.compute_logits = partial(_compute_logits, fused, model.compute_logits)


def _compute_logits(
    fused: Fused, original: Callable[..., torch.Tensor | None], hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    logits, fused.ready = fused.ready, None
    if logits is None or logits.shape[0] != hidden.shape[0]:
        logits = fused.logits(hidden)
    return original(hidden, *args, **kwargs) if logits is None else logits


def model_forward(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    fused, ids = runner.loradock_fused, kwargs.get("input_ids")
    if fused is not None:
        fused.ready = None
    if fused is not None and ids is not None and kwargs.get("inputs_embeds") is None and not args:
        out = fused.step(ids, kwargs["positions"])
        if out is not None:
            return out
    return original(runner, *args, **kwargs)


def compute_slot_mapping(
    original: Callable[..., None], table: Any, requests: int, starts: torch.Tensor, positions: torch.Tensor
) -> None:
    kernels = library()
    if kernels is None or positions.shape[0] > FEW or table.slot_mapping_mode != SlotMappingMode.TOKEN_TO_KV_SLOT:
        original(table, requests, starts, positions)
        return
    blocks = table.block_table.gpu
    kernels.loradock_slots(
        _at(starts),
        _at(positions),
        _at(blocks),
        ctypes.c_int64(blocks.stride(0)),
        ctypes.c_int64(table.block_size),
        _at(table.slot_mapping.gpu),
        requests,
    )


def greedy_sample(original: Callable[..., torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    rows, size = logits.shape
    kernels = library()
    if kernels is None or rows > 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        return original(logits)
    first = logits.data_ptr()
    best = [kernels.loradock_argmax(ctypes.c_void_p(first + 4 * size * i), ctypes.c_int64(size)) for i in range(rows)]
    return torch.tensor(best, dtype=torch.int64)
