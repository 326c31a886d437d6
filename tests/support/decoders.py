"""Decoders of every kind as the fused step takes them, without an engine: random weights, a paged cache, adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from serve.cpu_kernels import operators, packing, step
from serve.cpu_kernels.architecture import ROUNDED, SILU, Decoder, Layer, Norm, Rope
from serve.cpu_kernels.build import library

BLOCK = 32  # tokens


@dataclass(frozen=True)
class Kind:
    """A decoder: what is not said is as in Llama."""

    hidden: int = 64
    inner: int = 96
    heads: int = 4
    kv_heads: int = 2
    head: int = 32
    norms: tuple[bool, bool, bool, bool] = (True, False, True, False)
    norm: int = ROUNDED
    qk: str = ""  # "head", "heads" (weights of its own for each) or "whole"
    activation: int = SILU
    parallel: bool = False
    rotary: tuple[int, ...] = (32, 32)  # of each layer
    interleaved: bool = False
    windows: tuple[int, ...] = (0, 0)
    cap: float = 0
    multipliers: tuple[float, float, float, float] = field(default=(1, 1, 1, 0))  # embedding, residual, logits, cap
    vocabulary: int = 96
    blocks: int = 24  # of the cache
    positions: int = 160
    weights: int | str = packing.BF16  # or a type of ggml's, of blocks of 32


def like(size: str, weights: int, rows: int, context: int) -> Kind:
    """As large as SmolLM2-135M, or as six layers of a 1B, with room for so many requests of this length."""
    each = -(-(context + 2) // BLOCK)
    common: dict[str, Any] = {"head": 64, "weights": weights, "blocks": rows * each + 2, "positions": each * BLOCK}
    layers = 30 if size == "135M" else 6
    common |= {"rotary": (64,) * layers, "windows": (0,) * layers}
    if size == "135M":
        return Kind(hidden=576, inner=1536, heads=9, kv_heads=3, vocabulary=49152, **common)
    return Kind(hidden=2048, inner=8192, heads=32, kv_heads=8, vocabulary=8192, **common)


def norm_of(kind: int, *shape: int) -> Norm:
    return Norm((1 + torch.randn(*shape) * 0.2).bfloat16().float(), 1e-5, kind)


def decoder_of(kind: Kind) -> tuple[Decoder, list[list[torch.Tensor]]]:
    """One with random weights, and those of each layer."""
    torch.manual_seed(0)
    count, size = len(kind.windows), kind.head
    qkv = (kind.heads + 2 * kind.kv_heads) * size
    shapes = [(qkv, kind.hidden), (kind.hidden, kind.heads * size), (2 * kind.inner, kind.hidden)]
    shapes.append((kind.hidden, kind.inner))
    weights, layers = [], []
    for number in range(count):
        matrices = [(torch.randn(*shape) * shape[1] ** -0.5).bfloat16() for shape in shapes]
        q_shape = {"head": (size,), "heads": (kind.heads, size), "whole": (kind.heads * size,)}.get(kind.qk)
        k_shape = {"head": (size,), "heads": (kind.kv_heads, size), "whole": (kind.kv_heads * size,)}.get(kind.qk)
        layers.append(
            Layer(
                matrices=tuple(
                    SimpleNamespace(
                        loradock_matrix=_packed(weight, kind.weights, paired=place == 2),
                        loradock_weights="bfloat16",
                    )
                    for place, weight in enumerate(matrices)
                ),
                norms=tuple(norm_of(kind.norm, kind.hidden) if there else None for there in kind.norms),
                q_norm=norm_of(kind.norm, *q_shape) if q_shape else None,
                k_norm=norm_of(kind.norm, *k_shape) if k_shape else None,
                attention=SimpleNamespace(
                    num_heads=kind.heads,
                    num_kv_heads=kind.kv_heads,
                    head_size=size,
                    isa="vec",
                    layer_name=f"layer {number}",
                    kv_cache=torch.full(
                        (kind.blocks, kind.kv_heads, BLOCK, 2 * size), float("nan"), dtype=torch.bfloat16
                    ),
                ),
                rope=rope_of(kind, number) if kind.rotary[number] else None,
                window=kind.windows[number],
                scale=0.2,
                cap=kind.cap,
            )
        )
        weights.append(matrices)
    table = torch.randn(kind.vocabulary, kind.hidden).bfloat16()
    by = kind.multipliers
    return (
        Decoder(
            layers=layers,
            hidden=kind.hidden,
            inner=kind.inner,
            activation=kind.activation,
            parallel=kind.parallel,
            embedding=SimpleNamespace(weight=table),
            head=SimpleNamespace(weight=table),
            last=norm_of(kind.norm, kind.hidden),
            vocabulary=kind.vocabulary,
            embedding_by=by[0],
            residual_by=by[1],
            logits_by=by[2],
            logits_cap=by[3],
        ),
        weights,
    )


def _packed(weight: torch.Tensor, kind: int | str, paired: bool) -> int:
    if isinstance(kind, int):
        return packing.matrix(weight, kind, paired=paired)
    import gguf

    from tests.support.gguf_files import packed_blocks

    raw = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind])
    return packed_blocks([(kind, raw)], *weight.shape, paired=paired)


def rope_of(kind: Kind, number: int) -> Rope:
    half = kind.rotary[number] // 2
    angles = torch.arange(kind.positions)[:, None] * (100 * (number + 1)) ** (-torch.arange(half) / half)
    return Rope(torch.cat((angles.cos(), angles.sin()), dim=1).bfloat16(), 2 * half, kind.interleaved)


class Engine:
    """What vLLM tells of a step: whose tokens it has, and where their keys are in each group of layers."""

    def __init__(self, kind: Kind) -> None:
        self.positions = kind.positions
        self.windows = sorted(set(kind.windows))
        self.names = {window: [n for n, it in enumerate(kind.windows) if it == window] for window in self.windows}
        self.free = torch.randperm(kind.blocks - 1).add(1).tolist()  # block 0 is nobody's
        self.blocks: dict[tuple[int, int], list[int]] = {}
        self.attn_metadata: dict[str, SimpleNamespace] = {}
        self.prompts = torch.zeros(0, dtype=torch.int32)

    def schedule(
        self, spans: dict[int, tuple[int, int]], prompts: dict[int, int] | None = None
    ) -> tuple[torch.Tensor, int]:
        """The tokens from `begin` to `end` of each request; their positions come back.

        prompts: how long requests' prompts are. Of others several tokens are of the prompt, and one is of the answer.
        """
        lengths = {request: end if end > begin + 1 else 0 for request, (begin, end) in spans.items()} | (prompts or {})
        self.prompts = torch.tensor([lengths[request] for request in spans], dtype=torch.int32)
        starts = torch.tensor([0, *(end - begin for begin, end in spans.values())]).cumsum(0).int()
        positions = torch.cat([torch.arange(begin, end) for begin, end in spans.values()])
        for window in self.windows:
            table, slots = torch.zeros((len(spans), self.positions // BLOCK), dtype=torch.int32), []
            for row, (request, (begin, end)) in enumerate(spans.items()):
                mine = self.blocks.setdefault((request, window), [])
                while len(mine) * BLOCK < end:
                    mine.append(self.free.pop())
                gone = max(0, begin - window + 1) // BLOCK if window else 0  # given back, as vLLM does
                for place in range(gone):
                    if mine[place]:
                        self.free.insert(0, mine[place])
                        mine[place] = 0
                table[row, : len(mine)] = torch.tensor(mine)
                slots += [mine[at // BLOCK] * BLOCK + at % BLOCK for at in range(begin, end)]
            meta = SimpleNamespace(
                num_actual_tokens=len(positions),
                causal=True,
                block_table=table,
                slot_mapping=torch.tensor(slots),
                query_start_loc=starts,
                seq_lens=torch.tensor([end for _, end in spans.values()]),
            )
            self.attn_metadata |= {f"layer {number}": meta for number in self.names[window]}
        return positions, len(spans)


class Adapters:
    """Adapters of these ranks in every matrix of a decoder, one in each slot from 0 on."""

    def __init__(self, kind: Kind, decoder: Decoder, ranks: Sequence[int], keep: bool = True) -> None:
        torch.manual_seed(1)
        self.plan, self.slots = operators.Plan(), len(ranks)
        # Of (layer, matrix, slot): B A, unless nobody wants to compare.
        self.update: dict[tuple[int, int, int], torch.Tensor] = {}
        # Of the same, what DoRA multiplies each output with.
        self.gains: dict[tuple[int, int, int], torch.Tensor] = {}
        self.layers: dict[tuple[int, int], operators.Layer] = {}
        most = max(ranks)
        for number, layer in enumerate(decoder.layers):
            for place, module in enumerate(layer.matrices):
                inputs, outputs = _slices(kind)[place]
                a = [torch.zeros(len(ranks), 1, most, inputs, dtype=torch.bfloat16) for _ in outputs]
                b = [torch.zeros(len(ranks), 1, size, most, dtype=torch.bfloat16) for size in outputs]
                for slot, rank in enumerate(ranks):
                    for one, other in zip(a, b, strict=True):
                        one[slot, 0, :rank] = torch.randn(rank, inputs) * inputs**-0.5
                        other[slot, 0, :, :rank] = torch.randn(other.shape[2], rank) * 0.3
                    if not keep:
                        continue
                    held = _eight_bits if kind.weights != packing.BF16 else torch.Tensor.float
                    made = [held(one[slot, 0]).T @ held(other[slot, 0].T) for one, other in zip(a, b, strict=True)]
                    self.update[number, place, slot] = torch.cat(made, dim=1).T
                module.adapters = operators.Layer(self.plan, a, b, outputs)
                if kind.weights != packing.BF16:
                    module.adapters.keep_eight_bits()
                self.layers[number, place] = module.adapters
        for slot in range(len(ranks)):
            self.load(slot)

    def load(self, slot: int) -> None:
        """Have the kernels take in what a slot's tensors are."""
        operators.load(list(self.layers.values()), slot)

    def scale(self, slot: int) -> None:
        """A slot's adapter is a DoRA, some of whose magnitudes are far off the norms."""
        kernels = library()
        for (number, place), layer in self.layers.items():
            gains = self.gains[number, place, slot] = 1 + 0.3 * torch.randn(sum(layer.sizes))
            kernels.loradock_gains(layer.number, slot, ctypes.c_void_p(gains.data_ptr()), len(gains))

    def adapted(self, weight: torch.Tensor, number: int, place: int, slot: int) -> torch.Tensor:
        """What a layer's weight becomes for a slot; -1 is none."""
        weight = weight + self.update.get((number, place, slot), 0.0)
        gains = self.gains.get((number, place, slot))
        return weight if gains is None else gains[:, None] * weight

    def choose(self, slots: Sequence[int]) -> None:
        """The slot of each row of the next step, -1 for none."""
        self.plan.set(torch.tensor(slots), self.slots)


def _eight_bits(matrix: torch.Tensor) -> torch.Tensor:
    """What is left of it in 8 bits, each row, of one rank, by a scale of its own."""
    by = matrix.float().abs().amax(dim=1, keepdim=True) / 127
    return (matrix / by).nan_to_num().round() * by


def _slices(kind: Kind) -> list[tuple[int, list[int]]]:
    """Inputs of each of a layer's matrices, and the outputs of its parts."""
    q, kv = kind.heads * kind.head, kind.kv_heads * kind.head
    return [
        (kind.hidden, [q, kv, kv]),
        (q, [kind.hidden]),
        (kind.hidden, [kind.inner, kind.inner]),
        (kind.inner, [kind.hidden]),
    ]


# What `fused_of` wants of pytest's monkeypatch, in a process that ends afterwards.
SETATTR = SimpleNamespace(setattr=setattr)


def fused_of(monkeypatch: Any, decoder: Decoder, kind: int = packing.BF16) -> step.Fused:
    """The step over a decoder; `monkeypatch` as pytest's."""
    monkeypatch.setattr(step, "read", lambda model, positions: decoder)
    monkeypatch.setattr(step, "_adapters", lambda module: getattr(module, "adapters", None))
    decoder.head.loradock_keep = False
    decoder.head.loradock_matrix = packing.matrix(decoder.head.weight, kind)
    decoder.head.loradock_weights = packing.words(kind, decoder.head.loradock_matrix)
    model = SimpleNamespace(model=SimpleNamespace(embed_tokens=None), logits_processor=None)

    class Batch:
        @property
        def num_prompt_tokens_cpu_tensor(self) -> torch.Tensor:
            return step.get_forward_context().prompts

    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1))
    return step.Fused(SimpleNamespace(vllm_config=config, get_model=lambda: model, input_batch=Batch()))
