"""Replacing single functions of vLLM's: all of a table or nothing, and a sentence where one does not fit."""

from __future__ import annotations

import sys
from functools import wraps
from types import ModuleType

import pytest

from serve.cpu_kernels.patches import Patch, PatchError, apply


class Sampler:
    def pick(self, logits):
        return f"stock {logits}"

    @staticmethod
    def best(logits):
        return f"best {logits}"

    @classmethod
    def name(cls):
        return cls.__name__


def ours(original, *args):
    return f"ours, not {original(*args)}"


def upper(original, *args):
    return original(*args).upper()


@pytest.fixture
def vllm(monkeypatch):
    """A module to patch, and one that has imported a function of it by name."""
    stock = type("Sampler", (), {name: vars(Sampler)[name] for name in ("pick", "best", "name")})

    def helper(layer):
        return f"stock {layer}"

    modules = {name: ModuleType(name) for name in ("fake_vllm", "fake_vllm.layers", "elsewhere")}
    for name, module in modules.items():
        module.helper = helper
        monkeypatch.setitem(sys.modules, name, module)
    modules["fake_vllm"].Sampler = stock
    return modules


def patch(name: str, parameters: str, owner: str = "fake_vllm:Sampler", **more: str) -> Patch:
    return Patch(owner, name, parameters, f"{__name__}:ours", "to see it", **more)


def test_a_replacement_gets_what_it_replaces_whatever_kind_of_method_that_is(vllm):
    table = [patch("pick", "self logits"), patch("best", "logits"), patch("name", "cls")]
    apply(table)
    apply(table)
    sampler = vllm["fake_vllm"].Sampler
    assert sampler().pick(7) == "ours, not stock 7", "once, however often the table is applied"
    assert (sampler.best(7), sampler().best(7)) == ("ours, not best 7",) * 2
    assert sampler.name() == "ours, not Sampler"


def test_two_tables_may_replace_one_function_and_the_later_one_gets_the_replacement_of_the_first(vllm):
    over = Patch("fake_vllm:Sampler", "pick", "self logits", f"{__name__}:upper", "to see both")
    for table in ([patch("pick", "self logits")], [over], [patch("pick", "self logits")], [over]):
        apply(table)
    assert vllm["fake_vllm"].Sampler().pick(7) == "OURS, NOT STOCK 7"
    with pytest.raises(PatchError, match=r"pick takes \(self logits\) and not \(self\)"):
        apply([Patch("fake_vllm:Sampler", "pick", "self", f"{__name__}:upper", "vLLM's own arguments count")])


def test_what_wraps_a_replacement_is_left_in_its_place(vllm):
    table, sampler = [patch("pick", "self logits")], vllm["fake_vllm"].Sampler
    apply(table)
    sampler.pick = wraps(sampler.pick)(lambda *_: "watched")
    apply(table)
    assert sampler().pick(7) == "watched"


def test_a_function_is_replaced_where_its_package_has_imported_it_by_name(vllm):
    apply([patch("helper", "layer", owner="fake_vllm", copies="fake_vllm")])
    assert [module.helper(1) for module in vllm.values()] == ["ours, not stock 1", "ours, not stock 1", "stock 1"]


def test_what_no_longer_fits_is_named_in_a_sentence_and_nothing_is_changed(vllm):
    table = [patch("pick", "self logits"), patch("sample", "self"), patch("best", "logits top_k", checked="0.31.0")]
    table.append(patch("gone", "x", owner="fake_vllm.nowhere:Sampler"))
    with pytest.raises(PatchError) as caught:
        apply(table)
    said = str(caught.value)
    assert "checked against 0.31.0 and 0.32.0" in said and "\n" not in said
    assert "Sampler.sample is gone" in said and "Sampler.gone is gone" in said
    assert "Sampler.best takes (logits) and not (logits top_k)" in said and "pick" not in said
    assert vllm["fake_vllm"].Sampler().pick(7) == "stock 7"
