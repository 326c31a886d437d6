"""Adapters that the kernels keep in 8 bits: beside weights of 8 or 4 bits, where a step would read twice as much."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("these kernels are for machines without a GPU", allow_module_level=True)

from serve.cpu_kernels import build, operators

pytestmark = pytest.mark.skipif(not build.step_available(), reason="no kernels for this processor, or no compiler")

INPUTS, OUTPUTS, MOST = 100, 203, 33  # no multiples of a vector's width
RANKS = (1, 8, 17, 33)


class Both:
    """The same adapters, as they are and in 8 bits."""

    def __init__(self, fill, ranks=RANKS, inputs: int = INPUTS) -> None:
        self.plan, self.ranks = operators.Plan(), ranks
        self.a = torch.zeros(len(ranks), 1, MOST, inputs, dtype=torch.bfloat16)
        self.b = torch.zeros(len(ranks), 1, OUTPUTS, MOST, dtype=torch.bfloat16)
        for slot, rank in enumerate(ranks):
            self.a[slot, 0, :rank], self.b[slot, 0, :, :rank] = fill(rank, inputs), fill(OUTPUTS, rank)
        self.whole, self.eight = (
            operators.Layer(self.plan, [self.a], [self.b], [OUTPUTS], packed=True) for _ in range(2)
        )
        self.eight.keep_eight_bits()
        for slot in range(len(ranks)):
            operators.load([self.whole, self.eight], slot)

    def add(self, x: torch.Tensor, slots: list[int], layer: operators.Layer) -> torch.Tensor:
        self.plan.set(torch.tensor(slots), len(self.ranks))
        y = torch.zeros(len(slots), OUTPUTS, dtype=torch.bfloat16)
        operators.lora_linear(y, x, layer.number)
        return y

    def exact(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """In float32, whose sums of small integers are exact; zeros where there is no adapter."""
        a, b = self.a[:, 0].float(), self.b[:, 0].float()
        rows = [(row.float() @ a[slot].T @ b[slot].T) * (slot >= 0) for row, slot in zip(x, slots, strict=True)]
        return torch.stack(rows)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size) * 0.1


def integers(*size: int) -> torch.Tensor:
    """Of which 8 bits hold each one: they are divided by 1."""
    numbers = torch.randint(-3, 4, size).float()
    numbers[0], numbers[:, 0] = 127, 127
    return numbers


@pytest.mark.parametrize("inputs", [16, 100, 576])
@pytest.mark.parametrize("rows", [1, 3, 23, 90])
def test_of_numbers_that_fit_into_8_bits_only_what_lies_between_a_and_b_is_rounded(rows, inputs):
    torch.manual_seed(0)
    both = Both(integers, inputs=inputs)
    x, slots = torch.randint(-1, 2, (rows, inputs)).bfloat16(), [number % 4 for number in range(rows)]
    between = torch.einsum("ti,tri->tr", x.float(), both.a[slots, 0].float())
    exact = both.exact(x, slots)
    assert torch.equal(exact, torch.einsum("tr,tor->to", between, both.b[slots, 0].float()))
    # In 8 bits the largest of a row is exact, and no other one is further off than a 254th of it.
    b = both.b[slots, 0].float().abs().sum(dim=2) * (torch.tensor(both.ranks)[slots] > 1)[:, None]
    most = between.abs().amax(dim=1, keepdim=True) * b / 254 + exact.abs() / 256
    assert ((both.add(x, slots, both.eight).float() - exact).abs() <= 1.001 * most + 1e-3).all()


def test_a_row_without_an_adapter_stays_as_it_is():
    torch.manual_seed(0)
    both = Both(normal)
    x, slots = torch.randn(40, INPUTS).bfloat16(), [number % 5 - 1 for number in range(40)]
    y = both.add(x, slots, both.eight)
    assert [bool(row.any()) for row in y] == [slot >= 0 for slot in slots]


@pytest.mark.parametrize("rank", RANKS)
def test_others_are_as_far_off_as_8_bits_are(rank):
    torch.manual_seed(1)
    both = Both(normal, ranks=(rank,))
    x, slots = torch.randn(200, INPUTS).bfloat16(), [0] * 200
    exact = both.exact(x, slots)
    apart = (both.add(x, slots, both.eight).float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0.001 < apart.median() < 0.015  # of rank 1 a row may be nearly orthogonal to A, and is far off then
    assert rank == 1 or apart.max() < 0.03


def test_a_row_is_to_the_last_bit_what_it_is_alone():
    torch.manual_seed(2)
    both = Both(normal)
    x, slots = torch.randn(90, INPUTS).bfloat16(), [number % 5 - 1 for number in range(90)]
    together = both.add(x, slots, both.eight)
    alone = [both.add(row, [slot], both.eight) for row, slot in zip(x.split(1), slots, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_what_was_copied_is_read_no_more_and_may_be_dropped():
    torch.manual_seed(3)
    both = Both(normal)
    x, slots = torch.randn(8, INPUTS).bfloat16(), [number % 4 for number in range(8)]
    before = both.add(x, slots, both.eight)
    for slot in range(len(RANKS)):
        unread = both.eight.unread(slot)
        assert [tensor.data_ptr() for tensor in unread] == [both.a[slot].data_ptr(), both.b[slot].data_ptr()]
        assert [tensor.data_ptr() for tensor in both.whole.unread(slot)] == [both.b[slot].data_ptr()]
        for tensor in unread:
            tensor.zero_()
    assert torch.equal(both.add(x, slots, both.eight), before)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_as_it_is(wrong):
    """8 bits have none, and an answer made of it must not look like one."""
    torch.manual_seed(4)
    both = Both(lambda *size: normal(*size).index_fill_(1, torch.tensor([0]), wrong), ranks=(8, 17))
    x = torch.randn(2, INPUTS).bfloat16()
    assert not both.add(x, [0, 1], both.eight).isfinite().any()
    assert [tensor.data_ptr() for tensor in both.eight.unread(0)] == [both.b[0].data_ptr()]


def test_a_rank_of_zeros_adds_nothing():
    torch.manual_seed(5)
    both = Both(normal, ranks=(8,))
    both.b[0, 0, :, 3] = 0
    both.a[0, 0, 3] = 0
    operators.load([both.whole, both.eight], 0)
    x = torch.randn(3, INPUTS).bfloat16()
    whole, eight = (both.add(x, [0] * 3, layer).float() for layer in (both.whole, both.eight))
    assert (whole - eight).norm() < 0.02 * whole.norm()
