"""Rounding to few bits: what GPTQ is for is a smaller error of the output, and that is what is measured."""

from __future__ import annotations

import pytest
import torch

from optimize.steps.quantize.gptq import damped, following, gptq, nearest, scales


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (96, 128) and correlated inputs (1024, 128)."""
    torch.manual_seed(1)
    mix = torch.randn(128, 128) * torch.linspace(0.1, 2, 128)
    return torch.randn(96, 128), torch.randn(1024, 128) @ mix


def error(weight: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> float:
    wide = integers.float() * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return float(((wide - weight) @ x.T).square().mean() / (weight @ x.T).square().mean())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 128)])
def test_gptq_leaves_less_error_in_the_output_than_rounding_to_the_nearest(problem, bits, group):
    weight, x = problem
    hessian = x.T @ x
    scale = scales(weight, bits, group, hessian.diagonal())
    near, better = nearest(weight, scale, bits), gptq(weight, hessian.clone(), scale, bits)
    assert error(weight, better, scale, x) < 0.75 * error(weight, near, scale, x)
    limit = 2 ** (bits - 1)
    assert int(better.min()) >= -limit and int(better.max()) < limit


def test_gptq_without_the_inverse_is_gptq(problem):
    """Against the paper's own order of work: columns one after another, by the upper factor of the inverse."""
    weight, x = problem
    hessian = x.T @ x
    scale = scales(weight, 4, 32, hessian.diagonal())
    made = gptq(weight, hessian.clone(), scale, 4)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian[order][:, order].double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left = weight[:, order].double()
    for at, column in enumerate(order.tolist()):
        step = scale[:, column // 32].double()
        near = (left[:, at] / step).round().clamp(-8, 7)
        left[:, at:] -= ((left[:, at] - near * step) / upper[at, at])[:, None] * upper[at, at:]
        assert (near == made[:, column]).float().mean() > 0.99  # fp32 rounds a number in the middle to the other side


def test_a_weight_follows_what_the_layers_before_have_changed(problem):
    """Inputs of which rounding has turned a part: on unseen text the output is nearer to the original's."""
    weight, x = problem
    turned = torch.eye(128) + 0.2 * torch.randn(128, 128) / 128**0.5
    y, unseen = x[:768], x[768:]
    x = y @ turned
    moved = following(weight, damped(x.T @ x, len(x)), (y - x).T @ x)

    def lost(by: torch.Tensor) -> float:
        return float((unseen @ turned @ by.T - unseen @ weight.T).square().mean())

    assert lost(moved) < 0.75 * lost(weight)
    assert torch.equal(following(weight, damped(x.T @ x, len(x)), torch.zeros(128, 128)), weight)
    one = 1000 * torch.ones(128, 1) @ torch.ones(1, 128)  # of one vector, and not damped: it has no factor
    assert bool(following(weight, one, one.clone()).isfinite().all())


def test_without_correlation_gptq_is_rounding_to_the_nearest(problem):
    weight, _ = problem
    scale = scales(weight, 8, 128)
    same = gptq(weight, torch.eye(128) * 7, scale, 8) == nearest(weight, scale, 8)
    assert bool(same.all())


def test_few_vectors_some_of_them_large_do_not_lead_gptq_astray():
    """Measured on inputs that it did not see, where GPTQ alone is worse than rounding to the nearest."""
    torch.manual_seed(0)
    weight, mix = torch.randn(96, 128), torch.randn(128, 128) * torch.linspace(0.1, 2, 128)
    x = torch.randn(4000, 128) @ (torch.eye(128) + 0.1 * mix) * torch.randn(4000, 1).exp()
    few, others = x[:160], x[160:]
    hessian = few.T @ few
    scale = scales(weight, 4, 32, hessian.diagonal())
    plain, careful = gptq(weight, hessian.clone(), scale, 4), gptq(weight, damped(hessian, len(few)), scale, 4)
    off = error(weight, careful, scale, others)
    assert off < 0.9 * error(weight, plain, scale, others)
    assert off < error(weight, nearest(weight, scale, 4), scale, others) < error(weight, plain, scale, others)


def test_a_layer_that_was_never_active_is_rounded_all_the_same(problem):
    weight, _ = problem
    hessian = damped(torch.zeros(128, 128), 1024)
    scale = scales(weight, 4, 32)
    made = gptq(weight, hessian, scale, 4)
    assert error(weight, made, scale, torch.eye(128)) == error(weight, nearest(weight, scale, 4), scale, torch.eye(128))


def test_a_channel_that_was_never_active_does_no_harm(problem):
    weight, x = problem
    x[:, 5] = 0
    scale = scales(weight, 4, 32)
    made = gptq(weight, x.T @ x, scale, 4)
    assert error(weight, made, scale, x) < error(weight, nearest(weight, scale, 4), scale, x)


def test_clipping_by_error_beats_the_full_range_at_four_bits():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    weight[:, 0] *= 8  # an outlier in each row
    full = (weight.view(64, 2, 32).abs().amax(-1) / 7).bfloat16().float()
    eye = torch.eye(64)
    ours = scales(weight, 4, 32)
    assert error(weight, nearest(weight, ours, 4), ours, eye) < error(weight, nearest(weight, full, 4), full, eye)


def test_a_group_whose_widest_number_is_above_zero_has_a_negative_scale_where_that_is_nearer():
    """-8 to 7 steps of 0.25, and the same with the sign turned: both are met exactly."""
    weight = torch.arange(-8.0, 8.0).repeat(2, 2) * torch.tensor([[0.25], [-0.25]])
    found = scales(weight, 4, 32)
    assert found[:, 0].sign().tolist() == [1, -1]
    assert error(weight, nearest(weight, found, 4), found, torch.eye(32)) < 1e-4


def test_eight_bits_keep_the_largest_number_of_each_row():
    weight = torch.tensor([[0.5, -2.54], [1.27, 0.0]])
    scale = scales(weight, 8, 2)
    assert nearest(weight, scale, 8).abs().amax(1).tolist() == [127, 127]


@pytest.mark.parametrize("group", [32, 64])
def test_the_search_from_coarse_to_fine_finds_nearly_what_trying_everything_finds(group):
    torch.manual_seed(2)
    weight = torch.randn(256, 256) * torch.rand(256, 1).exp() * (1 + 3 * (torch.rand(256, 256) > 0.98))
    heavy = torch.rand(256) * torch.linspace(0.1, 3, 256)
    parts, importance = weight.view(256, -1, group), heavy.view(1, -1, group)
    widest = parts.abs().amax(-1)

    def off(scale: torch.Tensor) -> torch.Tensor:
        near = (parts / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
        return ((near - parts).square() * importance).sum(-1)

    every = [sign * (1 - 0.02 * step) * widest / 7 for step in range(20) for sign in (1, -1)]
    best = torch.stack([off(scale.bfloat16().float()) for scale in every]).amin(0).sum()
    assert float(off(scales(weight, 4, group, heavy)).sum() / best) < 1.02


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_group_of_zeros_stays_zeros(bits):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[1, :64], weight[2] = 0, 0
    scale = scales(weight, bits, 64, torch.ones(128))
    assert scale.isfinite().all() and (scale != 0).all()
    for integers in (nearest(weight, scale, bits), gptq(weight, torch.eye(128), scale, bits)):
        assert not integers[1, :64].any() and not integers[2].any()
