"""Every step on every family is exact, or refused before any work; the table in docs/families.md is what is found here.

Models are tiny and random, in float32, so that what a step changes on purpose is all that may differ. The other side of
a comparison is transformers' own forward. A plan looks at the processor too, and is told one that has all that a cell
asks for: the table is the same wherever it is checked. LORADOCK_WRITE_DOCS=1 writes the table's rows.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from optimize import processor
from optimize import recipe as recipes
from optimize.checkpoint import architectures
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.checkpoint.model import adapted, answered, entered, layers, logits, opened, settle, through
from optimize.data import text
from optimize.errors import OptimizeError, Refused
from optimize.job import Job
from optimize.options import Evaluate, Text
from optimize.pipeline import plan
from optimize.steps.calibrated import CalibratedModel, windows
from optimize.steps.kind import kinds
from optimize.steps.merge import combine, merge
from optimize.steps.prune import distillation, heal, prune
from optimize.steps.quantize import channel_scales, quantize
from optimize.steps.tune.encoding import Tokens
from optimize.steps.tune.learner import Learner, Start
from optimize.steps.tune.packing import rows
from optimize.steps.tune.settings import ROW, Settings
from tests.optimize.conftest import silent
from tests.support import families

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
OUTSIDE_VLLM = ("StableLM, side by side",)
Ask = Callable[[torch.Tensor], torch.Tensor]


class Subject:
    """One family's model, its adapters, and jobs over it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.base = families.written(name, folder / "base")
        self.texts = {}
        for part, seed in (("calibration", 1), ("evaluation", 2)):
            self.texts[part] = folder / f"{part}.txt"
            self.texts[part].write_text("\n\n\n".join(families.sentences(seed, 24)))
        examples = [{"prompt": line, "completion": line} for line in families.sentences(3, 10)]
        (folder / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
        self.one = families.adapter(self.base, folder / "one", 1)
        families.adapter(self.base, folder / "two", 2)
        self.reference = transformers_model(self.base)

    def job(self, kind: str, model: Path | None = None, **options: Any) -> Job:
        names = options.pop("names", ())
        if names:
            options["adapters"] = names
        out = self.folder / f"{kind}-{len(list(self.folder.iterdir()))}"
        out.mkdir()
        where = {name: str(self.folder / name) for name in ("one", "two")}
        return Job(
            kind=kind, options=msgspec.to_builtins(kinds()[kind].options(**options)), model=str(model or self.base),
            base=str(self.base), reference=str(self.base), adapters=where, originals=where,
            calibration=Text(text=str(self.texts["calibration"]), samples=8, tokens=24),
            evaluate=Evaluate(text=str(self.texts["evaluation"]), samples=4, tokens=24), seed=0, target="cpu",
            out=str(out),
        )  # fmt: skip

    def refuse(self, step: str, *names: str) -> None:
        """What the plan of a recipe with this step says; the adapters are those that it names, and `names`."""
        written = f"model: {self.base}\nsteps: [{step}]\nevaluate: {{engine: false}}\n"
        named = [name for name in ("one", "two") if name in step or name in names]
        adapters = ", ".join(f"{name}: {self.folder / name}" for name in named)
        export = "export: {format: onnx}\n" if self.name in OUTSIDE_VLLM else ""
        read = recipes.parse(f"{written}adapters: {{{adapters}}}\n{export}", self.folder)
        plan.made(read, self.base, {}, self.folder / "out", 10**12)


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def same(now: torch.Tensor, right: torch.Tensor, within: float = 1e-4) -> bool:
    assert float(right.std()) > 0.02
    return bool((now - right).abs().max() <= within * right.abs().max())


def measured(subject: Subject) -> None:
    assert same(logits(opened(subject.base, torch.float32), IDS), logits(subject.reference, IDS))


def tuned(subject: Subject) -> None:
    """A new LoRA changes nothing, and rows that are trained on give each sequence what it has alone."""
    settings = Settings(2, 4, learning_rate=1e-3, epochs=1, batch=2, max_length=24, gradient_checkpointing=False)
    learner = Learner(Start(subject.base, None, 0, "all-linear", False, "fp32", "cpu"), settings)
    units = [(Tokens(array("i", ids), array("b", [1] * len(ids))),) for ids in IDS.tolist()]
    trained = rows(units, range(len(units)), ROW if learner.packs(units) else 0)
    right = logits(subject.reference, IDS).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])
    assert same(torch.cat([learner.logps(row)[0].detach() for row in trained]), right.flatten())


def merged(subject: Subject) -> None:
    made = subject.job("merge", names=("one",))
    merge.run(made, silent)
    with adapted(transformers_model(subject.base), subject.one) as both:
        assert same(logits(opened(made.folder / "model", torch.float32), IDS), logits(both, IDS))


def combined(subject: Subject) -> None:
    made = subject.job("combine", names=("one", "two"), name="both", method="cat")
    assert combine.run(made, silent)["error"] < 1e-5
    whole = subject.job("merge", names=("one", "two"))
    merge.run(whole, silent)
    with adapted(transformers_model(subject.base), made.folder / "adapters" / "both") as both:
        assert same(logits(both, IDS), logits(opened(whole.folder / "model", torch.float32), IDS))


def without_layers(subject: Subject) -> Path:
    made = subject.job("prune", layers=1)
    (gone,) = prune.run(made, silent)["dropped"]
    by_hand = transformers_model(subject.base)
    layers(by_hand)[gone].forward = lambda states, *_, **__: states
    assert same(logits(opened(made.folder / "model", torch.float32), IDS), logits(by_hand, IDS))
    return made.folder / "model"


def narrower(subject: Subject) -> None:
    made = subject.job("prune", mlp=0.5)
    prune.run(made, silent)
    narrow, by_hand = opened(made.folder / "model", torch.float32), transformers_model(subject.base)
    for ours, whole in zip(layers(narrow), layers(by_hand), strict=True):
        kept = ours.mlp.down_proj.weight
        gone = [not (column == kept.T).all(1).any() for column in whole.mlp.down_proj.weight.T]
        assert sum(gone) == 64
        whole.mlp.down_proj.weight.data[:, torch.tensor(gone)] = 0
    assert same(logits(narrow, IDS), logits(by_hand, IDS))


def zeros(subject: Subject) -> None:
    """What each layer is calibrated on is what the layer reads in transformers' own forward."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: seen.append(call[-1])) for layer in layers(subject.reference)]
    logits(subject.reference, IDS)
    for hook in hooks:
        hook.remove()
    model = opened(subject.base, torch.float32)
    begun = entered(model, IDS, 1)
    with torch.inference_mode():
        for layer, right in zip(layers(model), seen, strict=True):
            begun = through([layer], begun)
            assert same(torch.cat(begun.states), right)
    made = subject.job("prune", pattern="2:4")
    assert prune.run(made, silent)["zeros"] == pytest.approx(0.5, abs=0.01)
    assert bool(logits(opened(made.folder / "model", torch.float32), IDS).isfinite().all())


def fewer_tokens(subject: Subject) -> None:
    from transformers import AutoTokenizer

    made = subject.job("prune", vocabulary="used")
    notes = prune.run(made, silent)
    assert notes["vocabulary"] < notes["vocabulary_before"]
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (subject.base, made.folder / "model"))
    line = families.sentences(1, 1)[0]
    kept = [old.get_vocab()[token] for token, _ in sorted(new.get_vocab().items(), key=lambda item: item[1])]
    before = logits(subject.reference, torch.tensor([old(line).input_ids]))[..., kept]
    assert same(logits(opened(made.folder / "model", torch.float32), torch.tensor([new(line).input_ids])), before)


def healed(subject: Subject) -> None:
    """The gradient of distillation is autograd's through the model's own output layer."""
    model: Any = opened(subject.base, torch.float32)
    states = torch.randn(2, 24, 64, requires_grad=True)
    theirs = torch.randn(2, 24, 64)
    norm = distillation._norm(model)
    normed = norm(states)
    loss, gradient = distillation.distance(distillation.Head.of(model), normed.detach(), norm(theirs))
    (ours,) = torch.autograd.grad(normed, states, gradient)
    said, wanted = answered(model, states).log_softmax(-1), answered(model, theirs).log_softmax(-1)
    right = (wanted.exp() * (wanted - said)).sum(-1).mean()
    (exact,) = torch.autograd.grad(right, states)
    assert abs(loss - right.item()) < 1e-4 * right.item()
    assert torch.allclose(ours, exact, atol=1e-4 * float(exact.abs().max()))
    repair = not architectures.of(Checkpoint(subject.base).config, "").normed
    made = subject.job("heal", without_layers(subject), repair=repair, steps=2, rank=2, batch=1, tokens=24)
    notes = heal.run(made, silent)
    if repair:
        assert all(after <= before for before, after in notes["repair"]["lacked"])


def smoothed(subject: Subject) -> None:
    rescaled(subject, {"smooth": True}, lambda model: channel_scales.smoothing(model, silent))


def protected(subject: Subject) -> None:
    options = {"scheme": "w4a16", "method": "awq"}
    rescaled(subject, options, lambda model: channel_scales.protecting(model, 64, silent))


def rescaled(subject: Subject, options: dict[str, Any], scales: Callable[[CalibratedModel], Any]) -> None:
    made = subject.job("quantize", **options)
    settle(0)  # as the step does: another number of threads may choose other factors
    model = CalibratedModel(subject.base, windows(made))
    factors = scales(model).factors
    assert (
        len(factors) == 3 * len(model.feeds_of(0)) and max(float(of.max() / of.min()) for of in factors.values()) > 1.5
    )
    for at in range(3):
        channel_scales.apply(model, at, factors)
    assert same(logits(model.model, IDS), logits(subject.reference, IDS))
    notes = quantize.run(made, silent)
    assert notes["scaling_moves_logits"] < 1e-4
    with (
        adapted(model.model, made.folder / "adapters" / "one") as ours,
        adapted(subject.reference, subject.one) as right,
    ):
        assert same(logits(ours, IDS), logits(right, IDS), 1e-3)
    off = logits(opened(made.folder / "model", torch.float32), IDS) - logits(subject.reference, IDS)
    assert off.norm() < (0.2 if "scheme" not in options else 0.6) * logits(subject.reference, IDS).norm()


def cached(subject: Subject) -> None:
    made = subject.job("quantize", kv_cache="fp8", method="rtn", smooth=False)
    quantize.run(made, silent)
    out = Checkpoint(made.folder / "model")
    assert sum(name.endswith((".self_attn.k_scale", ".self_attn.v_scale")) for name in out.entries) == 6
    with_cache = logits(opened(made.folder / "model", torch.float32), IDS)
    plain = subject.job("quantize", method="rtn", smooth=False)
    quantize.run(plain, silent)
    off = with_cache - logits(opened(plain.folder / "model", torch.float32), IDS)
    assert 0 < off.norm() < 0.2 * with_cache.norm()


# column -> (a recipe's step, the check)
COLUMNS: dict[str, tuple[str, Callable[[Subject], Any]]] = {
    "measure": ("", measured),
    "tune": ("{tune: {train: train.jsonl}}", tuned),
    "merge": ("{merge: {adapters: [one]}}", merged),
    "combine": ("{combine: {adapters: [one, two], name: both, method: cat}}", combined),
    "drop layers": ("{prune: {layers: 1}}", without_layers),
    "narrow MLP": ("{prune: {mlp: 0.5}}", narrower),
    "zeros": ("{prune: {pattern: 2:4}}", zeros),
    "vocabulary": ("{prune: {vocabulary: used}}", fewer_tokens),
    "heal": ("{prune: {layers: 1}}, {heal: {repair: false}}", healed),
    "least squares": ("{prune: {layers: 1}}, {heal: {steps: 0}}", lambda _: None),  # by `healed`
    "SmoothQuant": ("{quantize: {scheme: w8a8, smooth: true}}", smoothed),
    "AWQ": ("{quantize: {scheme: w4a16, method: awq}}", protected),
    "fp8 KV cache": ("{quantize: {scheme: w8a8, kv_cache: fp8}}", cached),
}


@pytest.fixture(autouse=True)
def in_float32_and_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers takes no tokenizer but Qwen's own for Qwen2.
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", PreTrainedTokenizerFast.from_pretrained)
    for module in ("optimize.checkpoint.model", "optimize.steps.calibrated"):
        monkeypatch.setattr(f"{module}.compute_dtype", lambda: torch.float32)


def on(sets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are for a processor with these instruction sets, whatever this one has."""
    monkeypatch.setattr(processor, "instruction_sets", lambda: sets)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_every_step_is_exact_or_refused_before_any_work(name, tmp_path, monkeypatch):
    on("avx2 avx512f", monkeypatch)
    subject = Subject(name, tmp_path)
    cells, reasons = [], {}
    for column, (step, check) in COLUMNS.items():
        try:
            subject.refuse(step)
        except Refused as refusal:
            cells.append("refused")
            reasons.setdefault(told(refusal.message), []).append(column)
            continue
        check(subject)
        cells.append("exact")
    row = f"| {name} | {' | '.join(cells)} |"
    lines = [row, *(f"- {name}, {', '.join(columns)}: {reason}" for reason, columns in reasons.items())]
    if os.environ.get("LORADOCK_WRITE_DOCS"):
        write(name, lines)
    shown = [line for line in DOCS.read_text().splitlines() if family_of(line) == name]
    assert lines == shown, "the table is old: run with LORADOCK_WRITE_DOCS=1"


def test_without_avx512_a_cache_in_fp8_is_refused_and_nothing_else(tmp_path, monkeypatch):
    subject = Subject("Llama", tmp_path)
    refused = {}
    for sets in ("avx2", "avx2 avx512f"):
        on(sets, monkeypatch)
        for column, (step, _) in COLUMNS.items():
            try:
                subject.refuse(step)
            except Refused as refusal:
                refused[sets, column] = refusal.message
    assert list(refused) == [("avx2", "fp8 KV cache")]
    (reason,) = refused.values()
    assert f"- without AVX-512, fp8 KV cache: {reason}" in DOCS.read_text().splitlines()


def test_the_table_has_a_cell_for_each_step_of_each_family_and_a_reason_for_each_refusal():
    lines = DOCS.read_text().splitlines()
    (header,) = (line for line in lines if line.startswith("| family |"))
    assert cells_of(header) == ["family", *COLUMNS]
    table = {name: cells for name, *cells in map(cells_of, lines) if name in families.CONFIGS}
    assert list(table) == list(families.CONFIGS)
    for name, cells in table.items():
        assert set(cells) <= {"exact", "refused"} and len(cells) == len(COLUMNS), name
        refused = {column for column, cell in zip(COLUMNS, cells, strict=True) if cell == "refused"}
        reasons = [line for line in lines if line.startswith("- ") and family_of(line) == name]
        given = [column for line in reasons for column in line.removeprefix(f"- {name}, ").split(": ")[0].split(", ")]
        assert sorted(given) == sorted(refused), name


def told(message: str) -> str:
    """A reason as the docs have it: without the step, where each step says the same."""
    unknown = re.search(r"does not know (models of type '\w+')", message)
    return f"these steps do not know {unknown[1]}" if unknown else message


def family_of(line: str) -> str:
    """Whose row of the table, or whose reason, a line of the docs is; the name of one family begins as another's."""
    names = [name for name in families.CONFIGS if line.startswith((f"| {name} |", f"- {name}, "))]
    return max(names, key=len, default="")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def write(name: str, lines: list[str]) -> None:
    old = [line for line in DOCS.read_text().splitlines() if family_of(line) != name]
    if "" not in old:
        raise AssertionError("docs/families.md has no place for the table")
    at = max((place for place, line in enumerate(old) if line.startswith("|")), default=0) + 1
    DOCS.write_text("\n".join([*old[:at], lines[0], *old[at:], *lines[1:]]) + "\n")


def test_scaling_what_a_layer_does_not_read_stops_the_run(tmp_path, monkeypatch):
    """Llama's norms on Gemma 2, whose MLP reads another one."""
    subject = Subject("Gemma 2", tmp_path)
    monkeypatch.setattr(architectures, "feeds", lambda _: architectures.LLAMA)
    with pytest.raises(OptimizeError, match="moves the logits of this Gemma 2 model by"):
        quantize.run(subject.job("quantize", smooth=True), silent)


def test_biases_of_an_adapter_are_merged_where_the_base_has_some(tmp_path):
    subject = Subject("Llama", tmp_path)
    families.adapter(subject.base, subject.one, lora_bias=True)
    merged(subject)
    for step, says in (
        ("{combine: {adapters: [one, two], name: both}}", "cannot be combined"),
        ("{prune: {vocabulary: used}}", "which vLLM does not take"),
    ):
        with pytest.raises(Refused, match=says):
            subject.refuse(step, "one", "two")


def test_a_bias_that_the_base_has_no_place_for_is_refused(tmp_path):
    subject = Subject("Qwen3", tmp_path)
    families.adapter(subject.base, subject.one, lora_bias=True)
    with pytest.raises(Refused, match="this base has none there to add it to"):
        subject.refuse("{merge: {adapters: [one]}}")


def test_a_multimodal_model_is_refused_by_what_it_is(tmp_path):
    subject = Subject("Gemma 3", tmp_path)
    config = json.loads((subject.base / "config.json").read_text())
    config |= {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}, "vision_config": {}}
    (subject.base / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=r"multimodal \(Gemma3ForConditionalGeneration\)"):
        subject.refuse("quantize")


def test_every_window_begins_as_a_prompt_does_in_the_engine(tmp_path):
    words = families.tokenizer()
    rows = text.windows(words, families.sentences(0, 4), 8, 24, 0)
    assert {row[0] for row in rows} == {2} and {len(row) for row in rows} == {24}
    assert all(2 not in row[1:] for row in rows)


def test_what_vllm_would_answer_wrongly_or_without_adapters_is_refused(tmp_path):
    """vLLM 0.32 computes StableLM's blocks one after the other whatever the config says, and has no LoRA for it."""
    subject = Subject("StableLM", tmp_path)
    subject.refuse("quantize")
    with pytest.raises(Refused, match="vLLM takes no adapters on StableLM: merge one into the base"):
        subject.refuse("quantize", "one")
    config = json.loads((subject.base / "config.json").read_text())
    (subject.base / "config.json").write_text(json.dumps(config | {"use_parallel_residual": True}))
    with pytest.raises(Refused, match=r"leaves out what this StableLM model has \(use_parallel_residual\)"):
        subject.refuse("quantize")
