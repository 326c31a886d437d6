"""Load an export anew, and hold what its manifest claims against what is measured here and now.

Its files against their digests, its original and its texts against theirs, and its scores by the code that measured
them. What adapters were merged, combined or trained is done again, since quality is measured against that. `rebuild`
carries out the whole recipe again: then the bytes are compared too, and the scores that steps measured themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from optimize import recipe as recipes
from optimize.checkpoint import artifact
from optimize.checkpoint.checkpoint import Checkpoint
from optimize.errors import Refused
from optimize.pipeline import manifest, signature
from optimize.pipeline import plan as plans
from optimize.pipeline.child import Tell
from optimize.pipeline.run import Run, State, texts
from optimize.pipeline.worker import sentence
from optimize.recipe import Recipe
from optimize.steps.merge.rules import Merge

# What another processor or another version of a library may change, as (absolute, relative), by a figure's last name.
# Figures that are not here are counts, such as bytes, and have to be the same.
LOGARITHM = (0.01, 0.0)
SHARE = (0.015, 0.0)
DIVERGENCE = (0.002, 0.1)
ALLOWED: Mapping[str, tuple[float, float]] = {
    "perplexity": (0.0, 0.01), "perplexity_original": (0.0, 0.01), "perplexity_base": (0.0, 0.01),
    "perplexity_increase": LOGARITHM, "perplexity_base_increase": LOGARITHM, "log_perplexity": LOGARITHM,
    "engine_difference": LOGARITHM, "valid_loss": LOGARITHM, "valid_loss_before": LOGARITHM,
    "top1": SHARE, "cosine": SHARE, "worst_adapter_effect": SHARE, "healed": SHARE, "combine_error": SHARE,
    "kl": DIVERGENCE, "kl_to_base": DIVERGENCE, "worst_adapter_kl": DIVERGENCE, "merge_kl": DIVERGENCE,
    "logit_difference": (0.01, 0.2),
}  # fmt: skip
TASK = (0.02, 0.0)  # a task's score: one question in fifty


@dataclass(frozen=True, slots=True)
class Sources:
    """Where what the export was made from lies here; `data` is the folder of the recipe's own files, by their names."""

    model: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One score: what is claimed and what was measured, None where there is nothing."""

    name: str
    claimed: float | None
    measured: float | None

    @property
    def result(self) -> str:
        if self.measured is None:
            return "not repeated"
        if self.claimed is None:
            return "measured"
        if self.measured == self.claimed:
            return "same"
        absolute, relative = allowed(self.name)
        near = abs(self.measured - self.claimed) <= absolute + relative * abs(self.claimed) + 1e-9
        return "close" if near else "differs"


@dataclass(slots=True)
class Verification:
    """What was found. `problems` are sentences about files; `notes` say what could not be looked at, and why."""

    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0  # that are as claimed

    @property
    def differing(self) -> list[str]:
        return self.problems + [f"{each.name} differs" for each in self.figures if each.result == "differs"]

    def plain(self) -> dict[str, Any]:
        figures = [{**asdict(each), "result": each.result} for each in self.figures]
        return {"figures": figures, "files": self.files, "problems": self.problems, "notes": self.notes,
                "verified": not self.differing}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verify:
    """Verify the export in `folder`. `find` gives a model's directory by its name; `expected` are figures that its
    maker claims elsewhere, `settings` of a recipe say what an export of others is measured on; `served` are the
    variables of a served engine."""

    folder: Path
    sources: Sources
    find: Callable[[str], Path]
    memory: int
    tell: Tell
    engine: bool = True
    expected: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)

    def __call__(self, rebuild: bool = False, key: Path | None = None) -> Verification:
        """Refused when the original or a text is not there, or is another one."""
        if not self.folder.is_dir():
            raise Refused(f"{self.folder} is no folder: name the one that holds the export")
        found, read = Verification(), manifest.whole(self.folder)
        if key is not None:
            signature.check(self.folder, key)
            found.notes.append(f"signed by the owner of {key.name}")
        elif (self.folder / signature.SIGNATURE).exists():
            found.notes.append("the manifest is signed; --key FILE with the maker's public key checks it")
        if read:
            self._compare_files(read, found)
        claimed = _flat(read.get("scores", {})) | dict(self.expected)
        recipe = self._recipe(read, whole=rebuild)
        if recipe.export.format == "vllm" and not self.engine:
            found.notes.append("not read in vLLM")
            recipe = _without_engine(recipe)
        elif recipe.export.format == "vllm" and find_spec("vllm") is None:
            found.notes.append("not read in vLLM, which is not installed")
            recipe = _without_engine(recipe)
        with tempfile.TemporaryDirectory(prefix="loradock-verify-") as place:
            out = Path(place) / "out"
            run = Run(recipe, self._plan(recipe, read, out), out, self.memory, self.tell, served=self.served)
            if rebuild:
                measured = self._rebuilt(recipes.changed(recipe, output=str(out)), run, read, found)
            else:
                with run.working():
                    measured = self._measured_or_said(run, found)
        found.figures = list(_figures(claimed, _flat(measured)))
        if not read:
            found.notes.append("there is no manifest.json: nothing is claimed but by --expect")
        return found

    def _compare_files(self, read: dict[str, Any], found: Verification) -> None:
        claimed = read["files"]
        there = _exported(self.folder)
        found.files = sum(there.get(name) == digest for name, digest in claimed.items())
        found.problems += [f"{name} is missing" for name in sorted(set(claimed) - set(there))]
        found.problems += [f"{name} is not in the manifest" for name in sorted(set(there) - set(claimed))]
        found.problems += [
            f"{name} is not the file of the manifest"
            for name in sorted(claimed)
            if there.get(name, "") not in ("", claimed[name])
        ]

    def _recipe(self, read: dict[str, Any], whole: bool) -> Recipe:
        """The export's recipe with the steps that decide what it is compared with, or all."""
        if not read:
            return self._recipe_of_others(whole)
        if self.settings:
            raise Refused("the manifest says what the export was measured on: --set is for exports of others")
        made = {**read["recipe"]}
        steps = [{step["step"]: {name: value for name, value in step["options"].items() if value is not None}}
                 for step in read["steps"] if step["step"] not in ("onnx", "genai", "gguf")]  # fmt: skip
        kinds = recipes.step_kinds()
        data = self.sources.data or Path.cwd()
        for step in steps:
            for kind, options in step.items():
                for name in kinds[kind].options.files if kind in kinds else ():
                    if options.get(name):
                        options[name] = str(data / Path(options[name]).name)
        for section in ("calibration", "evaluate"):
            if (text := made[section]["text"]) != "default" and not text.startswith("hf:"):
                made[section] = {**made[section], "text": str(data / Path(text).name)}
        own = made["evaluate"].get("adapter_texts") or {}
        own = {name: where if where.startswith("hf:") else str(data / where) for name, where in own.items()}
        made["evaluate"] = {**made["evaluate"], "adapter_texts": own}
        tasks = made["evaluate"].get("tasks") or []
        made["evaluate"] = {**made["evaluate"], "tasks": [
            str(data / Path(name).name) if name.endswith((".yaml", ".yml")) else name for name in tasks
        ]}  # fmt: skip
        made["adapters"] = self._adapters(read)
        made["model"] = self._model(read["recipe"])
        made["gate"] = {"max_size": made["gate"].get("max_size")}  # what was allowed is allowed again
        recipe = recipes.made(made | {"steps": steps}, Path.cwd())
        if whole:
            return recipe
        deciding = [at for at, step in enumerate(recipe.steps, 1) if step.makes or isinstance(step, Merge)]
        return recipes.changed(recipe, steps=recipe.steps[: max(deciding, default=0)])

    def _recipe_of_others(self, whole: bool) -> Recipe:
        """What an export without a manifest is measured by."""
        if whole:
            raise Refused(f"{self.folder} has no manifest.json, and so no recipe to carry out again")
        if not (self.folder / "config.json").is_file():
            raise Refused(
                f"{self.folder} has no manifest.json, and no config.json either: of others, a checkpoint or an "
                "ONNX export is measured, and no GGUF file"
            )
        if not self.sources.model:
            raise Refused(f"{self.folder} has no manifest.json: name the model that it came from with --model")
        form = "onnx" if list(self.folder.glob("model.onnx*")) else "vllm"
        made: dict[str, Any] = {"export": {"format": form}}
        return recipes.made(made | {"model": self._model(made)}, Path.cwd(), self.settings)

    def _model(self, made: dict[str, Any]) -> str:
        return str(self.find(self.sources.model or made["model"]))

    def _adapters(self, read: dict[str, Any]) -> dict[str, str]:
        names = read["recipe"]["adapters"]
        if missing := sorted(set(names) - set(self.sources.adapters)):
            raise Refused(f"the export was made with the adapter {missing[0]!r}: say --adapter {missing[0]}=FOLDER")
        return {name: str(Path(self.sources.adapters[name]).expanduser().resolve()) for name in names}

    def _plan(self, recipe: Recipe, read: dict[str, Any], out: Path) -> plans.Plan:
        """The plan, once model, adapters and texts are those that the manifest names."""
        plan = plans.made(recipe, Path(recipe.model), texts(recipe), out, self.memory)
        if read:
            _same("the model", plan.model, read["parent"]["files"], plan.inputs["model"])
            for name, folder in plan.adapters.items():
                _same(f"the adapter {name!r}", folder, read["adapters"][name], plan.inputs["adapters"][name])
            for name, digest in plan.texts.items():
                if read["texts"].get(name, digest) != digest:
                    raise Refused(f"the {name} text is not the export's: put its files into a folder and say --data")
        return plan

    def _measured_or_said(self, run: Run, found: Verification) -> dict[str, Any]:
        """The scores; a note where files are not those of the manifest and nothing can be made of them."""
        try:
            scores = self._measured(run)
        except Exception as error:  # of libraries that read what is broken
            if not found.problems:
                raise
            found.notes.append(f"its figures cannot be measured: {sentence(error)}")
            return {}
        return run.scored() | scores

    def _measured(self, run: Run) -> dict[str, Any]:
        """The scores of the export as it lies there."""
        state = run.start
        for step in run.recipe.steps:
            state = run.step(step, state)
        if run.recipe.trains_alone:
            return {}
        living = {
            name: self._adapter(name, place) for name, place in state.adapters.items() if name not in state.merged
        }
        if run.recipe.export.format in ("onnx", "genai"):
            living = {}
        size = 0
        if run.recipe.export.format == "adapter":
            made = [step.makes for step in run.recipe.steps if step.makes][-1]
            result = State(state.model, state.base, state.reference, living | {made: self.folder}, state.originals)
        elif run.recipe.export.format == "gguf":
            from optimize.export import gguf_file

            read = gguf_file.dense(Checkpoint(state.model), self.folder / gguf_file.FILE, run.work / "dense")
            result, size = replace(state, model=read, adapters=living), (self.folder / gguf_file.FILE).stat().st_size
        else:
            result = replace(state, model=self.folder, adapters=living)
        return run.measured(result, {"timed": False}, size)

    def _adapter(self, name: str, place: Path) -> Path:
        """An adapter as it is on the result: the export's own, where steps rewrote or made it."""
        own = self.folder / "adapters" / name
        return own if own.is_dir() else place

    def _rebuilt(self, recipe: Recipe, run: Run, read: dict[str, Any], found: Verification) -> dict[str, Any]:
        again = replace(run, recipe=recipe)()
        there = _exported(again)
        # The card says whether a gate was passed, and this run has none.
        other = [name for name, digest in read["files"].items() if there.get(name) != digest and name != "README.md"]
        now = manifest.of(again)
        if other and now["arithmetic"] == read.get("arithmetic") and now["versions"] == read["versions"]:
            found.problems += [f"{name} came out otherwise" for name in other]
        elif other:
            found.notes.append(
                f"{len(other)} of {len(read['files'])} files came out otherwise, on another processor, with other "
                "versions of libraries, or with newer steps: held against it are the figures alone"
            )
        else:
            found.notes.append("every file came out the same")
        scores: dict[str, Any] = now["scores"]
        return scores


def _without_engine(recipe: Recipe) -> Recipe:
    return recipes.changed(recipe, evaluate=msgspec.structs.replace(recipe.evaluate, engine=False))


def allowed(name: str) -> tuple[float, float]:
    """How far a figure may be off, as (absolute, relative)."""
    if name.startswith("tasks.") or name == "task_loss":
        return TASK
    leaf = name.rsplit(".", 1)[-1].removeprefix("engine_")
    return ALLOWED.get(leaf, ALLOWED.get(f"engine_{leaf}", (0.0, 0.0)))


def _exported(folder: Path) -> dict[str, str]:
    """Digests of the files that a manifest lists."""
    own = (manifest.NAME, signature.SIGNATURE)
    return {
        name: digest
        for name, digest in artifact.contents(folder).items()
        if name not in own and not name.startswith("report/")
    }


def _same(what: str, folder: Path, claimed: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Refused when a file that counts is missing or another; a hub's cards and pictures do not."""
    counts = {name for name in claimed if Path(name).suffix in (".safetensors", ".json", ".jinja", ".model")}
    if other := sorted(name for name in counts if there.get(name) != claimed[name]):
        raise Refused(
            f"{what} in {folder} is not the one that the export was made from: {', '.join(other[:3])} "
            f"{'differs' if len(other) == 1 else 'differ'}"
        )


def _flat(scores: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Figures by their dotted names; answers and what is timed are left out."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping) and name != "engine":
            flat |= _flat(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in manifest.TIMED_SCORES:
            flat[f"{before}{name}"] = value
    return flat


def _figures(claimed: Mapping[str, float], measured: Mapping[str, float]) -> Iterator[Figure]:
    for name in [*claimed, *(name for name in measured if name not in claimed)]:
        yield Figure(name, claimed.get(name), measured.get(name))
