"""A whole step of decoders of every kind against plain arithmetic, with no engine: each difference by itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build, operators, packing, step
from serve.cpu_kernels.architecture import CENTERED, GELU_TANH, PLAIN, SILU, Decoder, Layer, Norm, Rope, Unknown
from serve.cpu_kernels.operators import packed_linear
from tests.support.decoders import BLOCK, Adapters, Engine, Kind, decoder_of, fused_of

pytestmark = pytest.mark.skipif(not build.step_available(), reason="no kernels for this processor, or no compiler")

VOCABULARY = Kind.vocabulary

KINDS = {
    "plain": Kind(),
    "all query heads one key head, of 128": Kind(head=128, kv_heads=1, rotary=(128, 128)),
    "heads of 256": Kind(head=256, heads=2, kv_heads=1, rotary=(256, 256)),
    "heads of 96": Kind(head=96, rotary=(96, 96)),
    "seven query heads one key head, of 64": Kind(head=64, heads=7, kv_heads=1, rotary=(64, 64)),
    "windows": Kind(windows=(20, 20)),
    "windows in some layers": Kind(windows=(20, 0, 33, 0), rotary=(32, 32, 32, 32)),
    "window of one token": Kind(windows=(1, 64)),
    "attention capped": Kind(cap=1.5, windows=(20, 0)),
    "norms around": Kind(norms=(True, True, True, True), norm=PLAIN, activation=GELU_TANH),
    "norms after": Kind(norms=(False, True, False, True), qk="whole"),
    "norms of heads": Kind(qk="head"),
    "norms of each head": Kind(qk="heads", norm=CENTERED),
    "beside one another": Kind(norms=(True, False, False, False), parallel=True, norm=CENTERED, interleaved=True),
    "a part is turned": Kind(head=128, rotary=(96, 96)),
    "some layers do not turn": Kind(rotary=(32, 0)),
    "multiplied": Kind(multipliers=(3.0, 0.4, 0.25, 2.0)),
}


def normal(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    if norm is None:
        return x
    if norm.kind == CENTERED:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def turned(x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """(tokens, heads, size) at positions from 0 on."""
    if rope is None:
        return x
    cos, sin = rope.table[: x.shape[0], None].float().chunk(2, dim=-1)
    part, rest = x[..., : rope.size], x[..., rope.size :]
    a, b = (part[..., ::2], part[..., 1::2]) if rope.interleaved else part.chunk(2, dim=-1)
    one, other = a * cos - b * sin, b * cos + a * sin
    part = torch.stack((one, other), -1).flatten(-2) if rope.interleaved else torch.cat((one, other), -1)
    return torch.cat((part, rest), dim=-1)


def attended(kind: Kind, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
    tokens, size = qkv.shape[0], kind.head
    q, k, v = qkv.split([kind.heads * size, kind.kv_heads * size, kind.kv_heads * size], dim=-1)
    if kind.qk == "whole":
        q, k = normal(q, layer.q_norm), normal(k, layer.k_norm)
    q, k, v = (part.reshape(tokens, -1, size) for part in (q, k, v))
    if kind.qk in ("head", "heads"):
        q, k = normal(q, layer.q_norm), normal(k, layer.k_norm)
    q, k = turned(q, layer.rope), turned(k, layer.rope)
    k, v = (part.repeat_interleave(kind.heads // kind.kv_heads, dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
    if layer.cap:
        scores = layer.cap * torch.tanh(scores / layer.cap)
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (behind >= 0) & ((behind < layer.window) if layer.window else True)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).reshape(tokens, -1)


def exact(kind: Kind, decoder: Decoder, weights: list[list[torch.Tensor]], ids: torch.Tensor) -> torch.Tensor:
    """The outputs of one sequence in float32."""
    x = decoder.embedding.weight[ids].float() * decoder.embedding_by
    for layer, (qkv, o, gate_up, down) in zip(
        decoder.layers, (map(torch.Tensor.float, it) for it in weights), strict=True
    ):
        before, after, before_mlp, after_mlp = layer.norms
        first = normal(x, before)
        x = x + decoder.residual_by * normal(attended(kind, layer, first @ qkv.T) @ o.T, after)
        gate, up = ((first if kind.parallel else normal(x, before_mlp)) @ gate_up.T).chunk(2, dim=-1)
        gate = F.silu(gate) if kind.activation == SILU else F.gelu(gate, approximate="tanh")
        x = x + decoder.residual_by * normal((gate * up) @ down.T, after_mlp)
    return normal(x, decoder.last)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_decoder_is_computed_as_written(monkeypatch, name):
    """Prompts longer than the windows, cut into pieces and beside one another, then single tokens beyond them.

    The keys of the longer one are more than a prompt's tokens meet at a time, and begin and end within blocks.
    """
    kind = KINDS[name]
    decoder, weights = decoder_of(kind)
    engine = Engine(kind)
    fused = fused_of(monkeypatch, decoder)
    monkeypatch.setattr(step, "get_forward_context", lambda: engine)
    sequences = {
        number: torch.randint(VOCABULARY, (length,), dtype=torch.int32) for number, length in ((0, 152), (1, 40))
    }
    wanted = {number: exact(kind, decoder, weights, ids.long()) for number, ids in sequences.items()}
    steps = [{0: (0, 47)}, {0: (47, 147), 1: (0, 36)}, {0: (147, 148), 1: (36, 38)}, {0: (148, 149)}]
    steps += [{0: (at, at + 1), 1: (at - 111, at - 110)} for at in range(149, 151)]
    for spans in steps:
        ids = torch.cat([sequences[number][begin:end] for number, (begin, end) in spans.items()])
        positions, requests = engine.schedule(spans)
        out = fused.step(ids, positions)
        assert out is not None
        right = torch.cat([wanted[number][begin:end] for number, (begin, end) in spans.items()])
        apart = (out.float() - right).norm(dim=-1) / right.norm(dim=-1)
        assert apart.max() < 0.04 and apart.median() < 0.02, (spans, apart)
        if len(ids) == requests:
            logits = out.float() @ decoder.head.weight.float().T
            if decoder.logits_cap:
                logits = decoder.logits_cap * torch.tanh(logits / decoder.logits_cap)
            for mine in (fused.ready, fused.logits(out)):
                assert (mine - logits * decoder.logits_by).abs().max() < 1e-3 * logits.abs().max()


def test_a_block_that_a_step_fills_is_read_by_another_request_in_the_same_step(monkeypatch, threads):
    kind = KINDS["plain"]
    decoder, weights = decoder_of(kind)
    engine = Engine(kind)
    threads(1)  # requests are then attended in their order, the reader first
    fused = fused_of(monkeypatch, decoder)
    monkeypatch.setattr(step, "get_forward_context", lambda: engine)
    ids = torch.randint(VOCABULARY, (BLOCK + 1,), dtype=torch.int32)
    wanted = exact(kind, decoder, weights, ids.long())
    positions, _ = engine.schedule({0: (0, BLOCK - 1)})
    fused.step(ids[: BLOCK - 1], positions)
    engine.blocks[1, 0] = list(engine.blocks[0, 0])
    positions, _ = engine.schedule({1: (BLOCK, BLOCK + 1), 0: (BLOCK - 1, BLOCK)})
    out = fused.step(ids[positions], positions)
    apart = (out.float() - wanted[positions]).norm(dim=-1) / wanted[positions].norm(dim=-1)
    assert apart.max() < 0.04


@pytest.mark.parametrize("name", ["plain", "beside one another", "norms around"])
def test_a_thread_that_comes_late_changes_nothing(monkeypatch, threads, name):
    """More threads than cores: many of them come when others have done their part, or are in the next one."""
    kind = replace(KINDS[name], inner=8192)
    decoder, _ = decoder_of(kind)
    engine = Engine(kind)
    monkeypatch.setattr(step, "get_forward_context", lambda: engine)
    ids = torch.randint(VOCABULARY, (1,), dtype=torch.int32)
    threads(4 * torch.get_num_threads())
    fused = fused_of(monkeypatch, decoder)
    positions, _ = engine.schedule({0: (0, 1)})
    first = fused.step(ids, positions)
    assert all(torch.equal(fused.step(ids, positions), first) for _ in range(1000))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


RANKS = (16, 5, 1, 8)


def dense(number: int) -> torch.Tensor:
    """A packed matrix's numbers: a single 1 is exact in 8 bits."""
    kernels = build.library()
    outputs, inputs = (getattr(kernels, f"loradock_matrix_{name}")(number) for name in ("outputs", "inputs"))
    return packed_linear(torch.eye(inputs).bfloat16(), number, outputs).T


@pytest.mark.parametrize(
    "weights", [packing.BF16, packing.GROUP8, packing.GROUP4, "Q5_0"], ids=["bf16", "int8", "int4", "Q5_0"]
)
@pytest.mark.parametrize("name", ["plain", "beside one another", "norms after"])
def test_every_token_is_computed_with_its_own_adapter(monkeypatch, name, weights):
    """Prompts and single tokens of LoRA and DoRA of every rank, and of none, beside one another, in every order."""
    hidden, inner = (96, 224) if weights == "Q5_0" else (80, 208)
    kind = replace(KINDS[name], hidden=hidden, inner=inner, blocks=64, weights=weights)
    decoder, _ = decoder_of(kind)
    matrices = [[dense(module.loradock_matrix) for module in layer.matrices] for layer in decoder.layers]
    adapters = Adapters(kind, decoder, RANKS)
    for slot in (1, 3):
        adapters.scale(slot)
    fused, engine = fused_of(monkeypatch, decoder), Engine(kind)
    monkeypatch.setattr(step, "get_forward_context", lambda: engine)
    slots = [0, -1, 3, 3, 1, 2, 0, -1, 0, 3, 0, 0, 2, 0]
    ids = [torch.randint(VOCABULARY, (12 + 3 * number,), dtype=torch.int32) for number in range(len(slots))]
    wanted = []
    for slot, tokens in zip(slots, ids, strict=True):
        mine = [
            [adapters.adapted(weight, layer, place, slot) for place, weight in enumerate(of_layer)]
            for layer, of_layer in enumerate(matrices)
        ]
        wanted.append(exact(kind, decoder, mine, tokens.long()))
    length = [len(tokens) for tokens in ids]
    steps = [{0: (0, 9)}, {number: (9 * (number == 0), length[number] - 3) for number in range(len(slots))}]
    steps += [{number: (length[number] - 3, length[number] - 2) for number in range(len(slots))}]
    steps += [
        {number: (length[number] - 2, length[number] - 1) for number in some} for some in ((0,), (1, 2), range(3, 14))
    ]
    worst = []
    for spans in steps:
        adapters.choose([slots[number] for number, (begin, end) in spans.items() for _ in range(begin, end)])
        positions, _ = engine.schedule(spans)
        out = fused.step(torch.cat([ids[number][begin:end] for number, (begin, end) in spans.items()]), positions)
        right = torch.cat([wanted[number][begin:end] for number, (begin, end) in spans.items()])
        worst.append((out.float() - right).norm(dim=-1) / right.norm(dim=-1))
    apart = torch.cat(worst)
    # These adapters are as large as the weights: beside 8 or 4 bits all of their own rounding to 8 is seen here.
    assert apart.max() < (0.08 if weights == packing.BF16 else 0.14) and apart.median() < 0.03
    # Without the adapter it would be far off.
    bare = exact(kind, decoder, matrices, ids[0].long())
    assert ((wanted[0] - bare).norm(dim=-1) / bare.norm(dim=-1)).median() > 0.5


def test_a_token_with_an_adapter_is_to_the_last_bit_what_it_is_alone(monkeypatch):
    kind = replace(KINDS["plain"], blocks=80)
    decoder, _ = decoder_of(kind)
    adapters = Adapters(kind, decoder, RANKS)
    fused = fused_of(monkeypatch, decoder)
    slots = [number % 5 - 1 for number in range(13)] + [0] * 9
    ids = torch.randint(VOCABULARY, (len(slots), 40), dtype=torch.int32)
    outputs = []
    for groups in ([range(len(slots))], [[number] for number in range(len(slots))], [range(15), range(15, 22)]):
        engine = Engine(kind)
        monkeypatch.setattr(step, "get_forward_context", lambda engine=engine: engine)
        parts = []
        for group in groups:
            for begin, end in ((0, 30), (30, 31), (31, 32)):
                adapters.choose([slots[number] for number in group for _ in range(begin, end)])
                positions, _ = engine.schedule({number: (begin, end) for number in group})
                out = fused.step(torch.cat([ids[number, begin:end] for number in group]), positions)
            parts.append(out)
        outputs.append(torch.cat(parts))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", [Kind(hidden=72), Kind(head=80, rotary=(64, 64)), Kind(head=64, rotary=(48, 48))])
def test_sizes_that_the_kernels_do_not_have_are_named(monkeypatch, kind):
    monkeypatch.setattr(packing, "matrix", lambda *args, **kwargs: 0)
    decoder, _ = decoder_of(kind)
    with pytest.raises(Unknown) as caught:
        fused_of(monkeypatch, decoder)
    assert caught.value.reason == "size"


@pytest.mark.parametrize("name", ["plain", "windows in some layers", "heads of 96"])
def test_a_token_is_the_same_to_the_last_bit_however_its_prompt_is_cut_and_whatever_is_beside_it(monkeypatch, name):
    """In few large pieces, and in such that leave few tokens, or one, to go over the keys together."""
    kind = KINDS[name]
    decoder, _ = decoder_of(kind)
    fused = fused_of(monkeypatch, decoder)
    ids = torch.randint(VOCABULARY, (140,), dtype=torch.int32)
    outputs = []
    for cuts in ((0, 140), (0, 30, 75, 95, 140), (0, 64, 73, 140), (0, 17, 18, 23, 40, 75, 139, 140)):
        engine = Engine(kind)
        monkeypatch.setattr(step, "get_forward_context", lambda engine=engine: engine)
        parts = []
        for begin, end in pairwise(cuts):
            positions, _ = engine.schedule({0: (begin, end), **({1: (0, 20)} if begin == 75 else {})}, {0: 140})
            parts.append(fused.step(ids[positions], positions)[: end - begin])
        outputs.append(torch.cat(parts))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_an_adapter_of_the_embedding_changes_its_own_rows_and_no_bit_of_those_beside(monkeypatch):
    kind = KINDS["plain"]
    decoder, _ = decoder_of(kind)
    fused, ids = fused_of(monkeypatch, decoder), torch.randint(VOCABULARY, (60,), dtype=torch.int32)
    changed = torch.zeros(60, fused.hidden).bfloat16()
    changed[20:40] = torch.randn(20, fused.hidden).bfloat16()
    outputs = []
    for embeds in (
        None,
        lambda ids: decoder.embedding.weight[ids],
        lambda ids: decoder.embedding.weight[ids] + changed,
    ):
        engine = Engine(kind)
        monkeypatch.setattr(step, "get_forward_context", lambda engine=engine: engine)
        fused.embed, fused.embeds = embeds, SimpleNamespace(touched=lambda: True) if embeds else None
        positions, _ = engine.schedule({0: (0, 20), 1: (0, 20), 2: (0, 20)})
        outputs.append(fused.step(ids, positions))
    looked_up, same, moved = outputs
    assert torch.equal(looked_up, same)
    assert torch.equal(looked_up[:20], moved[:20]) and torch.equal(looked_up[40:], moved[40:])
    assert not torch.isclose(looked_up[20:40], moved[20:40]).any(1).all()


@pytest.mark.parametrize("multipliers", [(1, 1, 1, 0), (1, 1, 0.25, 0), (1, 1, 1, 3.0)], ids=["plain", "by", "cap"])
def test_an_adapter_of_the_output_layer_moves_its_own_logits_and_no_bit_of_those_beside(monkeypatch, multipliers):
    """Also where logits are multiplied, or capped: after the adapter has been added."""
    kind = replace(KINDS["plain"], multipliers=multipliers)
    decoder, _ = decoder_of(kind)
    fused, hidden = fused_of(monkeypatch, decoder), torch.randn(6, kind.hidden).bfloat16()
    a, b = torch.zeros(2, 1, 16, kind.hidden).bfloat16(), torch.zeros(2, 1, VOCABULARY, 16).bfloat16()
    a[1, 0, :4], b[1, 0, :, :4] = torch.randn(4, kind.hidden) * 0.1, torch.randn(VOCABULARY, 4)
    plan = operators.Plan()
    heads = operators.Layer(plan, (a,), (b,), (VOCABULARY,))
    for slot in range(2):
        operators.load([heads], slot)
    plain, fused.heads = fused.logits(hidden), heads
    for slots in ([-1, 1, 0, 1, -1, 1], [1] * 6, [-1, 0, -1, -1, 0, 0]):
        plan.set(torch.tensor(slots), 2)
        whose = torch.tensor(slots) == 1
        weights = decoder.head.weight.float() + whose[:, None, None] * (b[1, 0].float() @ a[1, 0].float())
        wanted = torch.einsum("th,tvh->tv", hidden.float(), weights)
        if decoder.logits_cap:
            wanted = decoder.logits_cap * torch.tanh(wanted / decoder.logits_cap)
        for ready in (None, plain.clone()):
            got = fused.logits(hidden, ready)
            assert torch.equal(got[~whose], plain[~whose])
            assert (got - wanted * decoder.logits_by).abs().max() < 0.02 * wanted.abs().max() * decoder.logits_by
            for row in whose.nonzero().flatten().tolist():
                plan.set(torch.tensor(slots[row : row + 1]), 2)
                assert torch.equal(fused.logits(hidden[row : row + 1]), got[row : row + 1]), "alone"
            plan.set(torch.tensor(slots), 2)
    assert not whose.any() and (got == plain).all()


@pytest.mark.parametrize("name", ["plain", "windows in some layers", "heads of 96"])
def test_a_token_with_drafts_behind_it_is_to_the_last_bit_what_it_is_alone(monkeypatch, name):
    """Right and wrong ones: the wrong ones' keys are overwritten."""
    kind = KINDS[name]
    decoder, _ = decoder_of(kind)
    fused = fused_of(monkeypatch, decoder)
    ids = torch.randint(VOCABULARY, (80,), dtype=torch.int32)
    outputs = []
    for drafts in (0, 7):
        engine = Engine(kind)
        monkeypatch.setattr(step, "get_forward_context", lambda engine=engine: engine)
        positions, _ = engine.schedule({0: (0, 40)})
        fused.step(ids[positions], positions)
        parts, at = [], 40
        while at < 72:
            positions, _ = engine.schedule({0: (at, at + 1 + drafts), 1: (at - 40, at - 39)}, {0: 40})
            drafted = ids[positions]
            drafted[4 : 1 + drafts] = 0  # the first three are right
            right = min(4, 1 + drafts)
            parts.append(fused.step(drafted, positions)[:right])
            at += right
        outputs.append(torch.cat(parts))
    assert torch.equal(*outputs)
