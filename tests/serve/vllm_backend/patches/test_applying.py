"""Replacing functions of vLLM's that are known by their source, and what becomes of a patch whose function changed."""

from __future__ import annotations

import sys
from functools import wraps
from types import ModuleType, SimpleNamespace

import pytest

from serve.vllm_backend.patches import applying, classes
from serve.vllm_backend.patches.applying import PatchError, apply, check, current_digest, decide
from serve.vllm_backend.patches.patch import Function, Patch
from serve.vllm_backend.patches.switches import Switches, parse


class Sampler:
    def pick(self, logits):
        return f"stock {logits}"

    @staticmethod
    def best(logits):
        return f"best {logits}"

    @classmethod
    def name(cls):
        return cls.__name__


def pick_altered(self, logits):
    return f"stock {logits + 1}"


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


def function(name: str, place: str = "fake_vllm:Sampler", by: str = "ours", **more) -> Function:
    """An entry that was read against what is there now."""
    place = f"{place}.{name}" if ":" in place else f"{place}:{name}"
    digest = current_digest(Function(place, "")) or ""
    return Function(place, digest, f"{__name__}:{by}", **more)


def patch(*functions: Function, name: str = "sampling", kind: str = "speed", **more) -> Patch:
    return Patch(name, kind, "to see it", functions, **more)


def decided(*patches: Patch, switches: Switches | None = None, on_cpu: bool = True, **environ: str):
    return decide(patches, current_digest, switches or Switches(), environ, on_cpu=on_cpu)


def test_a_replacement_gets_what_it_replaces_whatever_kind_of_method_that_is(vllm):
    table = patch(function("pick"), function("best"), function("name"))
    apply(table)
    apply(table)
    sampler = vllm["fake_vllm"].Sampler
    assert sampler().pick(7) == "ours, not stock 7", "once, however often the table is applied"
    assert (sampler.best(7), sampler().best(7)) == ("ours, not best 7",) * 2
    assert sampler.name() == "ours, not Sampler"


def test_two_patches_may_replace_one_function_and_both_are_compared_with_vllms_own(vllm):
    first, second = patch(function("pick")), patch(function("pick", by="upper"), name="loud")
    for each in (first, second, first, second):
        apply(each)
    assert vllm["fake_vllm"].Sampler().pick(7) == "OURS, NOT STOCK 7"
    assert all(state.on for state in decided(first, second).values())


def test_what_wraps_a_replacement_is_left_in_its_place(vllm):
    table, sampler = patch(function("pick")), vllm["fake_vllm"].Sampler
    apply(table)
    sampler.pick = wraps(sampler.pick)(lambda *_: "watched")
    apply(table)
    assert sampler().pick(7) == "watched"


def test_a_function_is_replaced_where_its_package_has_imported_it_by_name(vllm):
    apply(patch(function("helper", "fake_vllm", copies="fake_vllm")))
    assert [module.helper(1) for module in vllm.values()] == ["ours, not stock 1", "ours, not stock 1", "stock 1"]


def test_an_altered_function_turns_a_patch_for_speed_off_and_those_that_need_it(vllm):
    picking = patch(function("pick"), name="picking")
    table = [picking, patch(function("best"), name="best", needs=("picking",)), patch(function("name"), name="named")]
    vllm["fake_vllm"].Sampler.pick = pick_altered
    states = decided(*table)
    check(states)
    assert {name: state.on for name, state in states.items()} == {"picking": False, "best": False, "named": True}
    assert states["picking"].misfit and "Sampler.pick has changed" in states["picking"].reason
    assert states["best"].reason == "it needs picking, which is off" and not states["best"].misfit


@pytest.mark.parametrize("kind", ["correctness", "security"])
def test_an_altered_function_of_another_patch_ends_the_start_with_the_versions_that_work(vllm, kind):
    table = [patch(function("pick"), function("gone"), kind=kind), patch(function("best"), name="other")]
    vllm["fake_vllm"].Sampler.pick = pick_altered
    with pytest.raises(PatchError) as caught:
        check(decided(*table))
    said = str(caught.value)
    assert "Sampler.pick has changed; Sampler.gone is gone" in said and "\n" not in said
    assert f"sampling ({kind})" in said and "other" not in said
    assert "works with vLLM 0.32.0" in said and "read against 0.32.0 and 0.33.0" in said


@pytest.mark.parametrize("kind", ["speed", "correctness"])
def test_an_altered_function_of_the_real_table(monkeypatch, kind):
    """As a server meets it: vLLM's function is another one, and the process installs its patches."""
    pytest.importorskip("vllm")
    from vllm.tokenizers import detokenizer_utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(applying, "_installed", set())
    monkeypatch.setattr(applying, "_states", {})
    if kind == "correctness":
        monkeypatch.setattr(GPUModelRunner, "_get_prompt_logprobs_dict", pick_altered)
        with pytest.raises(PatchError, match=r"prompt-logprobs \(correctness\).*_get_prompt_logprobs_dict has changed"):
            applying.install("all")
        assert not applying.states()
        return
    monkeypatch.setattr(detokenizer_utils, "convert_ids_list_to_tokens", pick_altered)
    lines = []
    monkeypatch.setattr(applying, "apply", lambda patch: lines.append(patch.name))
    monkeypatch.setattr(applying.log, "warning", lambda words, *names: lines.append(words % names))
    applying.install("all")
    assert not applying.is_on("token-texts") and applying.is_on("prompt-logprobs")
    (line,) = (line for line in lines if "token-texts" in line)
    assert line.startswith("token-texts is off: vLLM 0.") and "\n" not in line
    assert "detokenizer_utils.convert_ids_list_to_tokens has changed" in line


def test_where_vllm_does_it_right_by_itself_nothing_is_replaced(vllm):
    stock = function("pick")
    fixed = Function(stock.place, "0" * 12, stock.replacement, fixed={"0.33.0": stock.digest})
    assert decided(patch(fixed))["sampling"].on
    apply(patch(fixed))
    assert vllm["fake_vllm"].Sampler().pick(7) == "stock 7"


def test_a_version_that_was_read_fits_too(vllm):
    stock = function("pick")
    changed = Function(stock.place, "0" * 12, stock.replacement, changed={"0.33.0": stock.digest})
    assert decided(patch(changed))["sampling"].on


def test_only_what_platform_and_settings_ask_for_is_decided(vllm):
    table = [
        patch(function("pick"), name="cpu", on="cpu"),
        patch(function("best"), name="asked", wanted=("LORADOCK_LORA_KERNELS", frozenset({"compile"}))),
        patch(function("name"), name="needs", needs=("asked",)),
    ]
    assert list(decided(*table, on_cpu=False)) == []
    assert list(decided(*table)) == ["cpu"]
    assert list(decided(*table, LORADOCK_LORA_KERNELS="compile")) == ["cpu", "asked", "needs"]


def test_safe_mode_leaves_what_answers_rely_on_and_names_leave_single_ones_out(vllm):
    table = [
        patch(function("pick"), name="token-texts"),
        patch(function("best"), name="media", kind="security"),
        patch(function("name"), name="lora-rows", kind="correctness"),
    ]

    def on(*words: str) -> list[str]:
        return [name for name, state in decided(*table, switches=parse(words)).items() if state.on]

    assert on("all") == on() == ["token-texts", "media", "lora-rows"]
    assert on("correctness") == ["media", "lora-rows"]
    assert on("all", "no-token-texts") == ["media", "lora-rows"]
    assert on("correctness", "no-media") == ["lora-rows"]
    with pytest.raises(ValueError, match=r"all or correctness, and no-NAME .* not 'no-mediums'; names: .*media"):
        parse(["no-mediums"])


def test_methods_come_in_by_a_subclass_and_the_class_stays_as_it_is(vllm, monkeypatch):
    monkeypatch.setattr(classes, "_methods", {classes.SCHEDULER: [], classes.RUNNER: []})
    stock = vllm["fake_vllm"].Sampler
    for by in ("ours", "upper"):
        classes.extend(function("pick", by=by, via=classes.SCHEDULER))
    kind = classes.get_scheduler_cls(lambda config: stock, SimpleNamespace())
    assert kind().pick(7) == "OURS, NOT STOCK 7" and issubclass(kind, stock)
    assert stock().pick(7) == "stock 7"
    assert classes.subclass(dict, classes.SCHEDULER) is dict, "vLLM's second kind, which has none of these methods"
