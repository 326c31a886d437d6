"""Several adapters as one: exact where that is promised, and the error stated where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimize.checkpoint.model import adapted, logits, opened
from optimize.steps.merge import combine, merge
from tests.optimize.conftest import silent

WEIGHTS = (1.0, -0.5, 0.7)
IDS = torch.arange(2, 34).view(2, 16)


@pytest.fixture(scope="module")
def three(adapter: Any) -> dict[str, Path]:
    return {name: adapter(seed=seed) for seed, name in enumerate(("a", "b", "c"), 10)}


def combined(job: Any, three: dict[str, Path], method: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    made = job("combine", adapters=three, names=three, name="all", method=method, weights=WEIGHTS, **options)
    notes = combine.run(made, silent)
    return made.folder / "adapters/all", notes


def exact(three: dict[str, Path], module: str) -> torch.Tensor:
    return sum(w * merge.read(n, f).update(module) for w, (n, f) in zip(WEIGHTS, three.items(), strict=True))


@pytest.mark.parametrize(("method", "rank"), [("cat", 0), ("svd", 12)])
def test_cat_and_a_wide_enough_svd_are_the_weighted_sum(method, rank, three, job):
    folder, notes = combined(job, three, method, rank=rank)
    assert (notes["rank"], notes["error"] < 1e-5) == (12, True)
    made = merge.read("all", folder)
    for module in made.lora:
        assert torch.allclose(made.update(module), exact(three, module), atol=1e-5)


def test_a_narrow_svd_says_what_it_lost(three, job):
    folder, notes = combined(job, three, "svd", rank=4)
    made = merge.read("all", folder)
    off = sum(float((made.update(m) - exact(three, m)).square().sum()) for m in made.lora)
    whole = sum(float(exact(three, m).square().sum()) for m in made.lora)
    assert notes["error"] == pytest.approx((off / whole) ** 0.5, rel=1e-3)
    # The best of this rank: no worse than the singular values that were left out.
    left = sum(float(torch.linalg.svdvals(exact(three, m))[4:].square().sum()) for m in made.lora)
    assert off == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_every_other_method_gives_an_adapter_that_loads_and_changes_the_base(method, three, job, base):
    folder, notes = combined(job, three, method, density=0.5, rank=8)
    assert notes["error"] > 0.01 and notes["means"]
    plain = opened(base, torch.float32)
    before = logits(plain, IDS)
    with adapted(plain, folder) as model:
        assert (logits(model, IDS) - before).abs().max() > 0.05


def test_modules_that_the_first_adapter_leaves_out_are_in_what_peft_loads(adapter, job, base):
    """The new adapter had the first one's `layers_to_transform`, and PEFT left out the other's layers in silence."""
    two = {"a": adapter(seed=10, layers_to_transform=[1]), "b": adapter(seed=11, exclude_modules=["v_proj"])}
    made = job("combine", adapters=two, names=list(two), name="all", method="cat")
    combine.run(made, silent)
    merged = job("merge", adapters=two, names=list(two), out="merged")
    merge.run(merged, silent)
    with adapted(opened(base, torch.float32), made.folder / "adapters/all") as model:
        now = logits(model, IDS)
    right = logits(opened(merged.folder / "model", torch.float32), IDS)
    assert (now - right).abs().max() < 0.05


def test_pruning_nothing_is_the_weighted_sum(three, job):
    _, notes = combined(job, three, "magnitude_prune", density=1.0, rank=12)
    assert notes["error"] < 1e-3


def test_the_same_seed_drops_the_same(three, job):
    first, _ = combined(job, three, "dare_ties", rank=4)
    second, _ = combined(lambda kind, **more: job(kind, out="again", **more), three, "dare_ties", rank=4)
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_linear_says_what_it_does_with_a_and_with_b(three, job):
    folder, notes = combined(job, three, "linear")
    made, parts = merge.read("all", folder), [merge.read(name, path) for name, path in three.items()]
    for module in made.lora:
        assert torch.allclose(made.lora[module]["A"], torch.stack([part.lora[module]["A"] for part in parts]).mean(0))
        rows = [w * part.scale(module) * part.lora[module]["B"] for w, part in zip(WEIGHTS, parts, strict=True)]
        assert torch.allclose(made.lora[module]["B"], sum(rows), atol=1e-6)
    assert notes["means"].startswith("the mean of the A and the weighted sum of the B")


def test_others_may_read_an_adapter_as_they_may_read_what_stands_beside_it(base, adapter, job, tmp_path):
    """safetensors writes files for their owner alone: a server with a user of its own could not open an export's."""
    from optimize.checkpoint.checkpoint import ADAPTER, ADAPTER_CONFIG

    made = job("combine", adapters={"one": adapter(1), "two": adapter(2)}, names=["one", "two"], name="both")
    combine.run(made, silent)
    folder = made.folder / "adapters" / "both"
    assert (folder / ADAPTER).stat().st_mode == (folder / ADAPTER_CONFIG).stat().st_mode
