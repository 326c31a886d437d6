"""A dense decoder's whole step in one call of `step.cpp`, in place of vLLM's layer by layer.

vLLM schedules, keeps the paged cache and samples; only its forward pass is replaced, and its output layer. The
functions at the end take the place of vLLM's (`patches.STEP`): each layer's weights are packed as they are loaded, in
place of vLLM's own (`one_copy`), and the model runner asks a `Fused` first. A kind of model (`architecture.Unknown`) or
of step (`Elsewhere`) that it does not know goes vLLM's way; the log says why once, and `tally` counts.
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
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.v1.attention.backends import cpu_attn

from serve.cpu_kernels import between_steps, eight_bits, one_copy, packing, pages, tally
from serve.cpu_kernels.architecture import Layer, Norm, Unknown, bare, read
from serve.cpu_kernels.build import cache_folder, instructions, library
from serve.cpu_kernels.operators import Layer as Adapters
from serve.cpu_kernels.operators import lora_linear
from serve.cpu_kernels.packing import at as _at
from serve.cpu_kernels.structures import BlockView, GroupView, NormView, ShapeView

log = logging.getLogger("loradock")


class Fused:
    """One loaded model, as the kernels know it."""

    def __init__(self, runner: Any) -> None:
        config, model = runner.vllm_config, runner.get_model()
        decoder = read(model, config.model_config.max_model_len)
        kernels = library()
        assert kernels is not None
        self.runner = runner
        self.kernels = kernels
        self.decoder = decoder
        self.hidden, self.vocabulary = decoder.hidden, decoder.vocabulary
        first = decoder.layers[0]
        shape = ShapeView(
            hidden=decoder.hidden,
            heads=first.attention.num_heads,
            kv_heads=first.attention.num_kv_heads,
            head=first.attention.head_size,
            inner=decoder.inner,
            activation=decoder.activation,
            parallel=decoder.parallel,
            embedding_by=decoder.embedding_by,
            residual_by=decoder.residual_by,
            logits_cap=decoder.logits_cap,
            logits_by=decoder.logits_by,
            embedding=_at(None if one_copy.replaced(decoder.embedding) else decoder.embedding.weight),
            last=_norm(decoder.last),
        )
        self.number = kernels.loradock_decoder(ctypes.byref(shape))
        if self.number < 0:
            raise Unknown("size", "its sizes are no multiples of 16, or its heads are not of 32, 64, 96, 128 or 256")
        self.formats: set[str] = set()
        for layer in decoder.layers:
            self._add(layer)
        self.attention = [layer.attention for layer in decoder.layers]
        self.groups: list[str] = []  # a layer of each group of layers that share block tables
        self.bound = 0
        head = decoder.head
        self.head = getattr(head, "loradock_matrix", -1)
        of_head = head.loradock_weights if self.head >= 0 else "bfloat16"
        self.weights = f"{', '.join(sorted(self.formats))}; output layer {of_head}"  # for whoever operates the server
        # The head's further rows are padding.
        table = decoder.embedding.loradock_matrix if one_copy.replaced(decoder.embedding) else -1
        self.kernels.loradock_decoder_head(self.number, self.head, self.vocabulary, table)
        self.ready: torch.Tensor | None = None  # the logits of the step that was just computed
        # Where an adapter changes the embedding, the rows are looked up by vLLM's.
        self.embed, self.embeds = model.model.embed_tokens, _adapted(model.model.embed_tokens)
        self.heads = _adapted(model.logits_processor)

    def _add(self, layer: Layer) -> None:
        matrices, loras = [], []
        for module in layer.matrices:
            linear = bare(module)
            matrix = getattr(linear, "loradock_matrix", -1)
            if matrix < 0:
                reason = getattr(linear, "loradock_refused", "its format is not known")
                raise Unknown("weights", f"{getattr(linear, 'prefix', 'a layer')}: {reason}")
            matrices.append(matrix)
            self.formats.update(linear.loradock_weights.split(", "))
            adapters = _adapters(module)
            loras.append(adapters.number if adapters else -1)
            if adapters and linear.loradock_weights != "bfloat16":
                adapters.keep_eight_bits()
        heads = layer.attention.num_heads, layer.attention.num_kv_heads
        q = layer.q_norm
        k = layer.k_norm
        size = layer.attention.head_size
        if (q is None) != (k is None):
            raise Unknown("norm", "only its queries or only its keys are normalized")
        per_head = whole = False
        if q is not None and k is not None and q.weight.shape != (size,):
            per_head = (q.weight.shape, k.weight.shape) == ((heads[0], size), (heads[1], size))
            whole = (q.weight.shape, k.weight.shape) == ((heads[0] * size,), (heads[1] * size,))
            if not per_head and not whole:
                raise Unknown("norm", "the norms of its queries and keys are of a size that is not known")
        rope = layer.rope
        block = BlockView(
            matrices=tuple(matrices),
            loras=tuple(loras),
            norms=tuple(_norm(norm) for norm in layer.norms),
            q=_norm(q),
            k=_norm(k),
            head_norms=size if per_head else 0,
            whole_norms=whole,
            cos_sin=_at(rope.table if rope else None),
            rotary=rope.size if rope else 0,
            interleaved=rope is not None and rope.interleaved,
            window=layer.window,
            scale=layer.scale,
            cap=layer.cap,
        )
        if self.kernels.loradock_decoder_layer(self.number, ctypes.byref(block)) < 0:
            raise Unknown("size", "the part of its heads that is rotated is no multiple of 32")

    def step(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """The model's output, (tokens, hidden) in bfloat16, normalized; None for a step that vLLM has to do."""
        try:
            return self._step(ids, positions)
        except Elsewhere as reason:
            _elsewhere(reason.args[0])
            return None

    def _step(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory, or warms up
            return None
        if not isinstance(metadata, dict):
            raise Elsewhere("attention")
        rows = ids.shape[0]
        if (layerwise := getattr(self.runner, "loradock_layerwise", None)) and layerwise():
            raise Elsewhere("dora")
        self._bind(metadata)
        metas = [metadata[name] for name in self.groups]
        meta = metas[0]
        if rows != meta.num_actual_tokens or any(it.causal is not True for it in metas):
            raise Elsewhere("attention")
        views = [GroupView(_at(it.block_table), it.block_table.stride(0), _at(it.slot_mapping)) for it in metas]
        groups = (GroupView * len(metas))(*views)
        embedded = self.embed(ids) if self._embeds() else None
        out = torch.empty((rows, self.hidden), dtype=torch.bfloat16)
        requests = meta.seq_lens.shape[0]
        # Where each request has one token, vLLM asks for all of their logits next.
        ahead = rows == requests and self.head >= 0
        self.ready = torch.empty((rows, self.vocabulary), dtype=torch.float32) if ahead else None
        refused = self.kernels.loradock_step(
            self.number,
            _at(ids),
            _at(embedded),
            _at(positions),
            groups,
            rows,
            _at(meta.query_start_loc),
            _at(self.runner.input_batch.num_prompt_tokens_cpu_tensor),
            requests,
            _at(out),
            _at(self.ready),
        )
        if refused:
            self.ready = None
            raise Elsewhere("adapter")
        tally.fused()
        return out

    def _embeds(self) -> bool:
        """Whether a row of this step has an adapter that changes its embedding, by a LoRA or with rows of its own."""
        own = getattr(self.runner, "loradock_embeds", None)
        return (self.embeds is not None and self.embeds.touched()) or (own is not None and own())

    def logits(self, hidden: torch.Tensor, ready: torch.Tensor | None = None) -> torch.Tensor | None:
        """(rows, vocabulary) in float32, not rounded on the way; None where vLLM has to compute them.

        ready: those of the base, if the step has computed them; they are written over.
        """
        if self.head < 0:
            return None
        cap, by = self.decoder.logits_cap, self.decoder.logits_by
        out = self._multiplied(hidden, cap, by) if ready is None or len(ready) != len(hidden) else ready
        heads = self.heads
        if heads is None or not (own := heads.rows()):
            return out
        if heads.plan.size != len(hidden) or heads.b[0].dtype != hidden.dtype:
            return None
        # vLLM's product depends on how many rows it has: an answer would depend on who else is there.
        moved = torch.zeros((len(hidden), heads.sizes[0]), dtype=hidden.dtype)
        lora_linear(moved, hidden.contiguous(), heads.number)
        mine = self._multiplied(hidden[own], 0.0, 1.0) if cap or by != 1 else out[own]
        mine += moved[own, : self.vocabulary]
        out[own] = (torch.tanh(mine / cap) * cap if cap else mine) * by
        return out

    def _multiplied(self, hidden: torch.Tensor, cap: float, by: float) -> torch.Tensor:
        """The output layer's product of these rows, without adapters."""
        out = torch.empty((hidden.shape[0], self.vocabulary), dtype=torch.float32)
        self.kernels.loradock_logits(
            self.head,
            _at(hidden),
            ctypes.c_int64(hidden.stride(0)),
            hidden.shape[0],
            _at(out),
            ctypes.c_int64(out.stride(0)),
            self.vocabulary,
            ctypes.c_float(cap),
            ctypes.c_float(by),
        )
        return out

    def _bind(self, metadata: dict[str, Any]) -> None:
        """Tell the kernels where the caches are, and which layers share block tables, once they are there."""
        cache = self.attention[0].kv_cache
        if cache.data_ptr() == self.bound:
            return
        caches = [attention.kv_cache for attention in self.attention]
        if (
            any(attention.isa != "vec" for attention in self.attention)
            or cache.ndim != 4
            or cache.dtype != torch.bfloat16
            or any(other.shape != cache.shape or other.stride() != cache.stride() for other in caches)
            or cache.stride(2) != cache.shape[3]
            or cache.stride(3) != 1
            or cache.shape[2] % 32
        ):
            raise Elsewhere("cache")
        # vLLM makes one object a step for all layers that share one.
        shared: dict[int, int] = {}
        self.groups, groups = [], []
        for attention in self.attention:
            meta = id(metadata[attention.layer_name])
            if meta not in shared:
                shared[meta] = len(self.groups)
                self.groups.append(attention.layer_name)
            groups.append(shared[meta])
        self.kernels.loradock_decoder_cache(
            self.number,
            (ctypes.c_void_p * len(caches))(*(other.data_ptr() for other in caches)),
            (ctypes.c_int * len(groups))(*groups),
            cache.shape[2],
            ctypes.c_int64(cache.stride(0)),
            ctypes.c_int64(cache.stride(1)),
        )
        self.bound = cache.data_ptr()


class Elsewhere(Exception):
    """Why vLLM does this step, in a word."""


def _elsewhere(reason: str) -> None:
    if tally.layers(reason) == 1:
        log.warning("a step runs layer by layer, not in one call: %s", tally.REASONS[reason])


def _check_engine(config: Any) -> None:
    parallel = config.parallel_config
    if config.model_config.dtype != torch.bfloat16 or config.cache_config.cache_dtype not in ("auto", "bfloat16"):
        raise Unknown("weights", "weights or KV cache are not bfloat16")
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        raise Unknown("engine", "it is spread over several workers")
    if config.kv_transfer_config is not None:
        raise Unknown("engine", "its KV cache is handed over layer by layer (kv_transfer_config)")
    if config.speculative_config is not None or config.model_config.runner_type != "generate":
        raise Unknown("engine", "it has a speculative_config, or generates nothing")


def _adapters(module: Any) -> Adapters | None:
    """A module's adapters, None where it takes none."""
    if not isinstance(module, BaseLayerWithLoRA):
        return None
    if any(size % 16 for size in module.output_slices):
        raise Unknown("size", "its sizes are no multiples of 16")
    adapters = _adapted(module)
    if adapters is None or module.lora_b_stacked[0].dtype != torch.bfloat16:
        raise Unknown("adapters", "its adapters are vLLM's own path's, or not bfloat16")
    return adapters


def _adapted(module: Any) -> Adapters | None:
    """The adapters of a module as the kernels know them, if they do."""
    return getattr(getattr(module, "punica_wrapper", None), "layer", None)


def _norm(norm: Norm | None) -> NormView:
    return NormView(norm.weight.data_ptr(), norm.eps, norm.kind) if norm else NormView()


_attention = cpu_attn._get_attn_isa


def _as_vectors(dtype: torch.dtype, block_size: int, *args: Any, **kwargs: Any) -> str:
    """The layout of the cache that the kernels know, also where vLLM would choose that of AMX or of arm64."""
    chosen = _attention(dtype, block_size, *args, **kwargs)
    return "vec" if chosen in ("amx", "neon") and block_size % 32 == 0 else chosen


def create_model(original: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any) -> Any:
    model, config = original(loader, *args, **kwargs), args[0] if args else kwargs["vllm_config"]
    try:
        _check_engine(config)
        decoder = read(model, config.model_config.max_model_len)
    except Unknown as reason:
        model.loradock_unknown = reason.with_traceback(None)
        return model
    model.loradock_unknown = None
    one_copy.take(model, decoder.embedding, decoder.head)
    _pack_when_loaded(model, decoder.embedding, decoder.head)
    load_weights = model.load_weights
    model.load_weights = lambda weights: load_weights(pages.read_once(weights))
    if decoder.head.weight is not decoder.embedding.weight or packing.shrinks():
        pages.keep_in_file(decoder.embedding.weight, cache_folder())
    if packing.shrinks():
        for layer in model.modules():
            if isinstance(layer, LinearBase) and type(layer.quant_method) is UnquantizedLinearMethod:
                one_copy.when_loaded(layer, partial(_take_in, layer))
    return model


def _pack_when_loaded(model: Any, embedding: Any, head: Any) -> None:
    """Have the methods of this model's layers for plain weights do what follows, each in front of its class's."""
    for layer in model.modules():
        if isinstance(layer, LinearBase) and type(layer.quant_method) is UnquantizedLinearMethod:
            one_copy.put(layer.quant_method, "process_weights_after_loading", process_weights_after_loading)
    for layer in (embedding, head):
        if type(layer.quant_method) is UnquantizedEmbeddingMethod:
            one_copy.put(layer.quant_method, "process_weights_after_loading", process_embedding_after_loading)
            one_copy.put(layer.quant_method, "embedding", look_up)


def _take_in(layer: Any) -> bool:
    """Whether a layer of bfloat16 weights is packed, and has none of its own."""
    if isinstance(layer, VocabParallelEmbedding):
        packing.head(layer)
        pages.leave(layer.weight)
    else:
        packing.floats(layer, layer.weight)
    return one_copy.replace(layer)


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Any) -> None:
    """Of a linear layer, or of the output layer."""
    if not one_copy.taken(layer) or not (one_copy.replaced(layer) or _take_in(layer)):
        original(method, layer)


def process_embedding_after_loading(original: Callable[..., None], method: Any, layer: Any) -> None:
    if one_copy.taken(layer) and not layer.loradock_keep and not hasattr(layer, "loradock_embedding"):
        return  # it is looked up, and vLLM would pack it for products that nobody asks of it
    process_weights_after_loading(original, method, layer)


def look_up(original: Callable[..., torch.Tensor], method: Any, layer: Any, ids: torch.Tensor) -> torch.Tensor:
    return one_copy.rows(layer, ids) if one_copy.replaced(layer) else original(method, layer, ids)


def process_int8_weights_after_loading(original: Callable[..., None], kernel: Any, layer: Any) -> None:
    scale = getattr(layer, kernel.layer_param_names[1])
    dynamic = kernel.config.input_symmetric and not kernel.config.is_static_input_scheme
    if one_copy.taken(layer) and dynamic and scale.numel() == layer.weight.shape[0]:
        packing.channels(layer, scale.detach().float().contiguous())
    if one_copy.replace(layer):
        kernel.linear_method = one_copy.multiply
        return
    original(kernel, layer)


def process_float8_after_loading(original: Callable[..., None], kernel: Any, layer: Any) -> None:
    weight, scale = (getattr(layer, name) for name in kernel.layer_param_names[:2])
    # (inputs, outputs) by now; scales of blocks come to other kernels.
    if one_copy.taken(layer) and scale.numel() in (1, weight.shape[1]):
        packing.float8(layer, weight.t(), scale.reshape(-1, 1))
    if one_copy.replace(layer):
        kernel.apply_weights = one_copy.multiply
        return
    original(kernel, layer)


def process_integers_after_loading(original: Callable[..., None], kernel: Any, layer: Any) -> None:
    if one_copy.taken(layer):
        packing.integers(layer, kernel)
    if one_copy.replace(layer, kernel.w_q_name):
        kernel.apply_weights = one_copy.multiply
        return
    original(kernel, layer)


def load_model(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
    eight_bits.register(runner.model_config.use_mla)
    original(runner, *args, **kwargs)
    runner.loradock_fused = None
    runner.sampler.greedy_sample = partial(between_steps.greedy_sample, type(runner.sampler).greedy_sample)
    model = runner.get_model()
    try:
        if not hasattr(model, "loradock_unknown"):
            raise Unknown("model", "vLLM loads it in a way that is not known")
        if model.loradock_unknown is not None:
            raise model.loradock_unknown
        pages.release()
        fused = runner.loradock_fused = Fused(runner)
    except Unknown as reason:
        log.warning("this model runs layer by layer, not in one call a step: %s", reason)
        runner.loradock_reason = reason.reason
        return
    log.info("the model runs in one call a step, by %s; its weights are %s", instructions(), fused.weights)
    cpu_attn._get_attn_isa = _as_vectors
    model.compute_logits = partial(_compute_logits, fused, model.compute_logits)


def _compute_logits(
    fused: Fused, original: Callable[..., torch.Tensor | None], hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    ready, fused.ready = fused.ready, None
    logits = fused.logits(hidden, ready)
    return original(hidden, *args, **kwargs) if logits is None else logits


def model_forward(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    fused, ids = runner.loradock_fused, kwargs.get("input_ids")
    if fused is None:
        if get_forward_context().attn_metadata is not None:
            tally.layers(runner.loradock_reason)
        return original(runner, *args, **kwargs)
    fused.ready = None
    if ids is None or kwargs.get("inputs_embeds") is not None or args:
        _elsewhere("embeddings")
        return original(runner, *args, **kwargs)
    out = fused.step(ids, kwargs["positions"])
    return original(runner, *args, **kwargs) if out is None else out
