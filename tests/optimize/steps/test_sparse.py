"""Zeros where they cost least, in the shape that was asked for, in a checkpoint that says nothing of them."""

from __future__ import annotations

import pytest
import torch

from optimize import recipe
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import logits, opened
from optimize.pipeline import plan
from optimize.steps.prune import prune, sparse
from tests.optimize.conftest import silent

IDS = torch.arange(2, 34).view(2, 16)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("shape", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_half_of_the_weights_are_zero_and_the_checkpoint_stays_dense(method, shape, base, job):
    made = job("prune", method=method, **shape)
    notes = prune.run(made, silent)
    pruned = Checkpoint(made.folder / "model")
    assert notes["zeros"] == pytest.approx(0.5, abs=0.01) and notes["layers"] == 21
    assert "sparsity_config" not in str(pruned.config) and pruned.bytes == Checkpoint(base).bytes
    for name in pruned.entries:
        if "_proj" in name and "pattern" in shape:
            left = (pruned.tensor(name).view(-1, 4) != 0).sum(1)
            assert int(left.max()) == 2, name
        elif "_proj" not in name:
            assert torch.equal(pruned.tensor(name), Checkpoint(base).tensor(name))


def test_what_looks_at_the_inputs_does_better_than_magnitude():
    """Inputs of very different size: magnitude drops what matters, Wanda does not, SparseGPT mends what it drops."""
    torch.manual_seed(0)
    x = torch.randn(512, 64) @ torch.randn(64, 64) * torch.logspace(-1, 1, 64)
    weight = torch.randn(32, 64)
    sums = x.T @ x
    off = {
        method: float((x @ (sparse.sparse(weight, method, 0.5, pattern, sums) - weight).T).square().mean())
        for pattern in [None]
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    plain = sparse.sparse(weight, "magnitude", 0.5, None, None)
    off["magnitude"] = float((x @ (plain - weight).T).square().mean())
    assert off["sparsegpt"] < 0.8 * off["wanda"] < 0.5 * off["magnitude"]


def test_sparsegpt_never_changes_what_no_input_reaches_into_nan():
    weight, x = torch.randn(8, 16), torch.randn(40, 16)
    x[:, 3] = 0
    made = sparse.sparse(weight, "sparsegpt", 0.5, (2, 4), x.T @ x)
    assert bool(made.isfinite().all()) and not bool(made[:, 3].any())


def test_zeros_are_those_that_sorting_finds_the_first_of_equals_first():
    """Sorting took most of the time; weights of 4 bits have many equals."""
    torch.manual_seed(0)
    weight = torch.randint(-7, 8, (24, 64)).float()
    for shape in ({"pattern": (2, 4), "sparsity": 0.0}, {"pattern": (3, 8), "sparsity": 0.0}):
        kept, of = shape["pattern"]
        parts = weight.abs().view(24, -1, of)
        gone = torch.zeros(parts.shape, dtype=torch.bool)
        gone.scatter_(-1, parts.argsort(dim=-1, stable=True)[..., : of - kept], True)
        made = sparse.sparse(weight, "magnitude", sums=None, **shape)
        assert torch.equal(made, weight.masked_fill(gone.view(24, 64), 0))
    made = sparse.sparse(weight, "magnitude", 0.3, None, None)
    order = weight.abs().flatten().argsort(stable=True)[: round(0.3 * weight.numel())]
    assert torch.equal(made.flatten(), weight.flatten().index_fill(0, order, 0))


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_sparsegpt_is_the_papers_column_by_column(pattern):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 256), torch.randn(512, 256) * torch.logspace(-1, 1, 256)
    made = sparse.sparse(weight, "sparsegpt", 0.5, pattern, x.T @ x)
    sums = x.T @ x
    sums.diagonal().add_(0.01 * sums.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(sums.double()), upper=True).float()
    left = weight.clone()
    for at in range(256):
        if pattern and at % pattern[1] == 0:
            of = slice(at, at + pattern[1])
            cost = (left[:, of] / upper.diagonal()[of]).square()
            gone = torch.zeros(cost.shape, dtype=torch.bool)
            gone.scatter_(1, cost.argsort(dim=1)[:, : pattern[1] - pattern[0]], True)
        elif not pattern and at % 128 == 0:
            cost = (left[:, at : at + 128] / upper.diagonal()[at : at + 128]).square()
            gone = cost <= cost.flatten().kthvalue(cost.numel() // 2).values
        error = left[:, at] * gone[:, at % (pattern[1] if pattern else 128)] / upper[at, at]
        left[:, at:] -= error[:, None] * upper[at, at:]
    right = left.masked_fill(made == 0, 0)
    torch.testing.assert_close(made, right, rtol=1e-3, atol=1e-4)
    assert float((left.masked_fill(made != 0, 0)).abs().max()) < 1e-4  # the same are zero


def test_the_plan_says_first_that_zeros_make_nothing_smaller_or_faster(written, texts):
    for shape in ("sparsity: 0.5", "pattern: 2:4, method: wanda"):
        read = recipe.load(written(f"steps: [{{prune: {{{shape}}}}}]"))
        made = plan.made(read, plan.Path(read.model), {}, plan.Path("/tmp/out"), 10**12)
        assert "neither size nor speed" in made.steps[0].warning


def test_an_adapter_of_the_base_still_fits(base, job, adapter):
    made = job("prune", adapters={"one": adapter()}, sparsity=0.25)
    assert prune.run(made, silent)["adapters"] == {"one": "applies unchanged"}
    assert logits(opened(made.folder / "model"), IDS).isfinite().all()
