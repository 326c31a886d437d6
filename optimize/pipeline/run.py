"""Run a recipe step by step; a run that is killed at any moment can go on with `--resume`.

Each step runs in a child process with a memory bound and writes to a temporary folder. A finished folder is renamed to
a name that holds the digest of everything that the step depends on, by which `--resume` finds it. The output directory
appears by one rename at the very end.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from optimize import processor
from optimize.checkpoint import artifact, shards
from optimize.data import text
from optimize.errors import GateFailed, OptimizeError, Refused
from optimize.job import Job
from optimize.options import Step, plain
from optimize.pipeline import device, lock, manifest, report, step_code
from optimize.pipeline.child import Child, Tell
from optimize.pipeline.facts import Done, Facts
from optimize.pipeline.gate import judge
from optimize.pipeline.plan import Plan, by_content
from optimize.pipeline.resident import Resident
from optimize.pipeline.signals import Signals
from optimize.pipeline.worker import TASKS, sentence
from optimize.recipe import Recipe
from optimize.steps.kind import kinds
from optimize.steps.merge.rules import Merge

NOTES = "notes.json"
OWN_TEXT = "adapter {}"  # an adapter's text among the digests


@dataclass(frozen=True, slots=True)
class State:
    """The model and the adapters between two steps; `reference` is what quality is measured against, and `originals`
    are the adapters that fit it."""

    model: Path
    base: Path
    reference: Path
    adapters: dict[str, Path]
    originals: dict[str, Path]
    merged: frozenset[str] = frozenset()


@dataclass(slots=True)
class Run:
    """One run of a recipe. `tell` hears how far each step is; `served` are the variables of a served engine; in the
    folder `watched` steps leave what others look at meanwhile."""

    recipe: Recipe
    plan: Plan
    out: Path
    memory: int
    tell: Tell
    resume: bool = False
    keep_rejected: bool = False
    served: dict[str, str] = field(default_factory=dict)
    watched: Path | None = None
    signals: Signals = field(default_factory=Signals)
    resident: Resident = field(default_factory=Resident)
    done: list[Done] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".work")

    @property
    def start(self) -> State:
        """The state before the first step."""
        adapters = dict(self.plan.adapters)
        return State(self.plan.model, self.plan.model, self.plan.model, adapters, adapters)

    def __call__(self) -> Path:
        """The output directory; GateFailed when the result is not good enough."""
        if self.out.exists():
            if self.resume and manifest.of(self.out).get("key") == self.plan.key:
                shutil.rmtree(self.work, ignore_errors=True)
                return self.out
            raise Refused(f"{self.out} exists already; remove it, or name another place with --out")
        with self.working():
            state = self.start
            for step in self.recipe.steps:
                state = self.step(step, state)
            return self._finish(state)

    def step(self, step: Step, state: State) -> State:
        """The state after one step."""
        # What was merged is in the model by now, and no step has to look after it any more.
        consumed = set(step.consumed)
        living = {name: path for name, path in state.adapters.items() if name not in state.merged or name in consumed}
        done = self._do(step.kind, plain(step), replace(state, adapters=living), step.reads_text, by_content(step))
        made = done.folder / "model"
        model = made if made.is_dir() else state.model
        adapters, originals = dict(state.adapters), dict(state.originals)
        for folder in sorted((done.folder / "adapters").glob("*")):
            adapters[folder.name] = folder
            originals.setdefault(folder.name, folder)
        for folder in sorted((done.folder / "exact").glob("*")):  # a combined adapter is held against the exact sum
            originals[folder.name] = folder
        merged = state.merged | consumed
        if isinstance(step, Merge):  # quality is measured against base and adapters from here on
            return State(model, state.base, model, adapters, dict(adapters), merged)
        return State(model, state.base, state.reference, adapters, originals, merged)

    def _finish(self, state: State) -> Path:
        """Export, measure, judge, and publish the output directory."""
        # Adapters that were merged or combined are in the model by now; the others have to work on it.
        living = {name: path for name, path in state.adapters.items() if name not in state.merged}
        state = replace(state, adapters=living)
        form = self.recipe.export.format
        answering = state
        if form in ("onnx", "genai", "gguf"):
            exported = self._do(form, plain(self.recipe.export), state, self.recipe.export.calibrates)
            state = replace(state, model=exported.folder / "model", adapters={})
            # Of a GGUF file what its weights are is measured, and the adapters on it.
            answering = replace(answering, model=exported.folder / "dense") if form == "gguf" else state
        scores = self.scored() | self.measured(answering, size=exported.notes["bytes"] if form == "gguf" else 0)
        verdicts = judge(self.recipe.gate, scores, adapted=bool(living), rounded=self.recipe.rounds)
        passed = all(verdict.holds for verdict in verdicts)
        facts = Facts(self.recipe, self.plan, self.done, scores, verdicts)
        aside = self.work / "export.part"
        shutil.rmtree(aside, ignore_errors=True)
        if form == "adapter":
            made = [step.makes for step in self.recipe.steps if step.makes][-1]
            shutil.copytree(state.adapters[made], aside)
        else:
            own = self.work in state.model.parents
            shutil.copytree(state.model, aside, copy_function=artifact.taken if own else shutil.copy2)
            if form == "vllm":
                shards.limited(aside, self.recipe.export.shard_bytes)
            self._copy_new_adapters(state, aside)
        report.write(aside / "report", facts)
        manifest.write(aside, facts)
        if not passed and not self.keep_rejected:
            shown = self.out.with_name(self.out.name + ".report")
            artifact.publish(aside / "report", shown)
            shutil.rmtree(aside)
            raise GateFailed(_rejected(verdicts) + f"; nothing was exported, the report is in {shown}")
        if not passed:
            rejected = self.out.with_name(self.out.name + ".rejected")
            artifact.publish(aside, rejected)
            raise GateFailed(_rejected(verdicts) + f"; the rejected export is in {rejected}")
        artifact.publish(aside, self.out)
        shutil.rmtree(self.work, ignore_errors=True)
        return self.out

    def scored(self) -> dict[str, Any]:
        """What the steps measured themselves."""
        scores: dict[str, Any] = {}
        for done in self.done:
            for name, score in done.notes.get("scores", {}).items():
                worst = done.kind in kinds() and name in kinds()[done.kind].worst
                scores[name] = max(score, scores.get(name, score)) if worst else score
        return scores

    def measured(self, state: State, engine: dict[str, Any] | None = None, size: int = 0) -> dict[str, Any]:
        """The scores of a result against what it came from: on held-out text, on tasks, and in the engine, whose
        options are `engine`. `size`: bytes of the export, where what is measured is another form of its weights."""
        scores: dict[str, Any] = {}
        form = self.recipe.export.format
        if not self.recipe.trains_alone:
            options = {"format": "onnx" if form == "genai" else form}
            scores |= self._do("evaluate", options, state, uses_text=True).notes["scores"]
        if size and "bytes" in scores:
            scores |= {"bytes": size, "size_ratio": round(size / scores["bytes_original"], 4)}
        if self.recipe.evaluate.tasks:
            questions = {"tasks": list(self.recipe.evaluate.tasks), "task_limit": self.recipe.evaluate.task_limit}
            scores |= self._do("tasks", questions, state, uses_text=False).notes["scores"]
        if form == "vllm" and self.recipe.evaluate.engine:
            scores |= self._do("engine", engine or {}, state, uses_text=True).notes["scores"]
            off = abs(scores["engine_log_perplexity"] - scores["log_perplexity"])
            scores["engine_difference"] = round(off, 5)
        return scores

    def _copy_new_adapters(self, state: State, aside: Path) -> None:
        for name, folder in sorted(state.adapters.items()):
            if folder != self.plan.adapters.get(name):
                shutil.copytree(folder, aside / "adapters" / name)

    def _do(
        self,
        kind: str,
        options: dict[str, Any],
        state: State,
        uses_text: bool,
        counted: dict[str, Any] | None = None,
    ) -> Done:
        """The step's folder, from an earlier run or made now; `counted` are the options as they decide its bytes."""
        inputs = {
            "kind": kind,
            "options": counted or options,
            "model": self._digest(state.model),
            "reference": self._digest(state.reference) if kind in TASKS or kinds()[kind].compares else "",
            "base": self._digest(state.base) if kind == "evaluate" else "",
            "adapters": {name: self._digest(path) for name, path in state.adapters.items()},
            "originals": {name: self._digest(path) for name, path in state.originals.items() if kind == "evaluate"},
            "text": self._text(kind) if uses_text else {},
            "seed": self.recipe.seed,
            "target": self.recipe.target,
            "versions": manifest.versions(),
            "arithmetic": processor.arithmetic(),
            "code": step_code.of(kind, options),
        }
        where, folder = self._place(kind, options, inputs)
        start = time.monotonic()
        redone = not folder.is_dir()
        if redone:
            aside = folder.with_name(folder.name + ".part")
            _keep_only_partial(aside)
            job = Job(
                kind=kind,
                options=options,
                model=str(state.model),
                base=str(state.base),
                reference=str(state.reference),
                adapters={name: str(path) for name, path in state.adapters.items()},
                originals={name: str(path) for name, path in state.originals.items()},
                calibration=self.recipe.calibration,
                evaluate=self.recipe.evaluate,
                seed=self.recipe.seed,
                target=self.recipe.target,
                out=str(aside),
                watched=str(self.watched or ""),
                device=where,
                memory=self.memory,
            )
            notes = Child(self.work, self.memory, self.tell, self.served, self.resident, self.signals).run(job)
            shutil.rmtree(aside / "partial", ignore_errors=True)
            if where == device.CUDA and (gpu := processor.gpu()):
                notes["gpu"] = gpu.name
            notes["seconds"] = round(time.monotonic() - start, 1)
            artifact.write_json(aside / NOTES, notes)
            artifact.publish(aside, folder)
        notes = json.loads((folder / NOTES).read_text())
        done = Done(kind, options, folder, notes, notes["seconds"], redone)
        self.done.append(done)
        self.tell(kind, 1, 1, "" if redone else "done before")
        return done

    def _place(self, kind: str, options: dict[str, Any], inputs: dict[str, Any]) -> tuple[str, Path]:
        """The step's device and folder. What one device has finished, another that is free now need not compute."""
        gpu, places = processor.gpu(), {}
        for where in device.of_step(kind, options, self.recipe, self.plan.steps, self.plan.bytes):
            named = {"gpu": gpu.name} if gpu and where == device.CUDA else {}
            places[where] = self.work / f"{len(self.done) + 1:02d}-{kind}-{artifact.key(inputs | named)}"
        return next((found for found in places.items() if found[1].is_dir()), next(iter(places.items())))

    def _digest(self, folder: Path) -> str:
        """Of what is in a model's or an adapter's folder; the plan has read the recipe's model already."""
        if folder == self.plan.model:
            return _key(self.plan.inputs["model"])
        return _digested(str(folder), folder.stat().st_mtime_ns)

    def _text(self, kind: str) -> dict[str, Any]:
        """What a step reads of the recipe's texts and how they are used."""
        measured = {name: value for name, value in plain(self.recipe.evaluate).items() if name != "engine"}
        prefix = OWN_TEXT.format("")
        measured["adapter_texts"] = {
            name.removeprefix(prefix): digest for name, digest in self.plan.texts.items() if name.startswith(prefix)
        }
        if kind in ("evaluate", "engine"):
            return {"evaluation": self.plan.texts["evaluation"], **measured}
        read = {"calibration": self.plan.texts["calibration"], **plain(self.recipe.calibration)}
        reads_both = kind in kinds() and kinds()[kind].reads_evaluation  # an export is no kind of step
        return read | ({"evaluation": self.plan.texts["evaluation"]} if reads_both else {})

    @contextmanager
    def working(self) -> Iterator[None]:
        """The work folder, for one run at a time; what an earlier run left is kept for --resume and swept otherwise.
        Signals of the terminal and of supervisors reach the steps' processes meanwhile."""
        try:
            self.work.parent.mkdir(parents=True, exist_ok=True)
            with self.signals, lock.held(self.out):
                if not self.resume:
                    shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir(exist_ok=True)
                try:
                    yield
                finally:
                    self.resident.close()
        except OSError as error:
            raise OptimizeError(sentence(error)) from error


def _keep_only_partial(aside: Path) -> None:
    """An empty folder for a step, but for what the step itself kept to go on from."""
    aside.mkdir(exist_ok=True)
    for path in aside.iterdir():
        if path.is_dir() and path.name != "partial":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def texts(recipe: Recipe) -> dict[str, str]:
    """Digests of the calibration and evaluation text, which must not overlap."""
    if recipe.trains_alone:
        return {}
    calibration, evaluation = text.documents(recipe.calibration, False), text.documents(recipe.evaluate, True)
    digests = {"calibration": text.digest(calibration), "evaluation": text.digest(evaluation)}
    held_out = [evaluation]
    for name, where in recipe.evaluate.adapter_texts.items():
        held_out.append(text.documents(msgspec.structs.replace(recipe.evaluate, text=where), True))
        digests[OWN_TEXT.format(name)] = text.digest(held_out[-1])
    if recipe.export.calibrates or any(step.reads_text for step in recipe.steps):
        for documents in held_out:
            text.apart(calibration, documents)
    return digests


def _rejected(verdicts: list[Any]) -> str:
    return "the gate is not passed: " + "; ".join(verdict.sentence for verdict in verdicts if not verdict.holds)


@cache
def _digested(folder: str, _: int) -> str:
    return _key(artifact.contents(Path(folder)))


def _key(contents: Mapping[str, str]) -> str:
    return artifact.key({name: digest for name, digest in contents.items() if name != NOTES})
