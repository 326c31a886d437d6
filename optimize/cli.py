"""`loradock optimize`: run, plan or list recipes, verify exports, check examples, train in a job's folder, ask an ONNX.

Exit codes: 0 done, 1 a step failed, 2 the recipe is wrong or this machine cannot run it, 3 the gate is not passed or
an export is not what its manifest says, 4 stopped by SIGTERM.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from optimize import recipe as recipes
from optimize.data import examples
from optimize.errors import UNREAD, Differs, OptimizeError, RecipeError, Refused

if TYPE_CHECKING:
    from optimize.pipeline.plan import Plan
    from optimize.pipeline.resident import Resident
    from optimize.recipe import Recipe

Embedded = Callable[[str], Path]
Served = Callable[[], dict[str, str]]
Show = Callable[["Plan", Path], None]


def _gigabytes(value: float) -> float:
    if not 0 <= value < 1e6:
        raise typer.BadParameter(f"takes GB, such as 12, not {value:g}")
    return value


Memory = Annotated[
    float,
    typer.Option("--memory", help="GB that a step may use (default: 4/5 of what is free).", callback=_gigabytes),
]
INTERRUPTED = 130  # what typer makes of Ctrl-C
EVERY = 15.0  # seconds between two lines when there is no terminal

HELP = """Turn a base model and its LoRA adapters into an optimized, measured export.

RECIPE is a YAML file, or the name of a recipe that comes along (--list). The output directory appears all at once, with
manifest.json and a report, when the result passes the recipe's gate; otherwise the report alone, and exit code 3.

\b
Examples:
  loradock optimize --list
  loradock optimize int8-cpu --plan
  loradock optimize int8-cpu --model ./my-model --adapter tone=./my-adapter --out ./my-model-int8
  loradock optimize my-recipe.yaml --resume
  loradock optimize verify ./my-model-int8 --model ./my-model
  loradock optimize check train.jsonl
  loradock optimize tune ./job
  loradock optimize validate ./my-adapter --train train.jsonl
  loradock optimize run-onnx ./my-model-onnx "What is the capital of France?" --adapter tone
  loradock optimize setup-optimum
"""


def run(arguments: Sequence[str], embedded: Embedded, served: Served = dict) -> int:
    """The command with `arguments`; `embedded` gives the directory of a model that comes along, `served` the variables
    that an engine has when it is served on this machine. The exit code."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    others: dict[str, Callable[..., None]] = {
        "run-onnx": run_onnx, "check": check, "tune": _tune_command(embedded), "setup-optimum": setup_optimum,
        "verify": _verify_command(embedded, served), "validate": _validate_command(embedded),
    }  # fmt: skip
    if arguments and (command := others.get(arguments[0])):
        app.command(arguments[0], help=command.__doc__)(command)
        return _exit_code(app, arguments[1:], f"loradock optimize {arguments[0]}")
    app.command("optimize", help=HELP)(_optimize_command(embedded, served))
    return _exit_code(app, arguments, "loradock optimize")


def _exit_code(app: typer.Typer, arguments: Sequence[str], name: str) -> int:
    try:
        # What a command says by typer.Exit comes back as a number; commands return nothing.
        code = int(app(args=list(arguments), prog_name=name, standalone_mode=False) or 0)
    except OptimizeError as error:
        _print_error(error.message)
        return error.exit_code
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # typer's, without a word
            raise
        _print_error(UNREAD)
        return 1
    except Exception as error:  # typer's usage errors; their class depends on the click that typer uses
        if hasattr(error, "format_message"):
            _print_error(error.format_message())
            return 2
        raise
    if code == INTERRUPTED:
        _print_error(f"stopped{'; go on with --resume' if name == 'loradock optimize' else ''}")
    return code


def _print_error(message: str) -> None:
    with suppress(BrokenPipeError):  # its reader may be gone too
        print(f"loradock: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # Python would try again, and end with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _optimize_command(embedded: Embedded, served: Served) -> Callable[..., None]:
    def optimize(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from --list.")] = "",
        out: Annotated[Path | None, typer.Option("--out", help="The output directory (default: the recipe's).")] = None,
        model: Annotated[str, typer.Option("--model", help="Instead of the recipe's model.")] = "",
        adapter: Annotated[list[str] | None, typer.Option("--adapter", help="NAME=FOLDER, as often as needed.")] = None,
        set_: Annotated[
            list[str] | None, typer.Option("--set", help="A key of the recipe, as evaluate.engine=false.")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run was.")] = False,
        keep_rejected: Annotated[
            bool, typer.Option("--keep-rejected", help="Export what fails the gate, marked.")
        ] = False,
        plan: Annotated[
            bool, typer.Option("--plan", help="Print what would be done and what it needs, and do nothing.")
        ] = False,
        list_: Annotated[bool, typer.Option("--list", help="The recipes that come along.")] = False,
        memory: Memory = 0.0,
        sign: Annotated[
            Path | None, typer.Option("--sign", help="Sign the manifest with this private key (PEM).")
        ] = None,
        json_: Annotated[bool, typer.Option("--json", help="Plan and progress as JSON, an object a line.")] = False,
    ) -> None:
        if list_:
            for name, what in recipes.shipped().items():
                typer.echo(f"{name:<16} {what}")
            return
        if not recipe:
            raise RecipeError("name a recipe: a YAML file, or one of those that `loradock optimize --list` shows")
        overrides = dict(_pair(word, "--set") for word in set_ or [])
        read = recipes.load(recipe, overrides, model=_model(model), adapters=_adapters(adapter or []))
        where = (out or Path(read.output or f"./{Path(read.model).name}-optimized")).expanduser().resolve()
        read = recipes.changed(read, output=str(where))
        if plan:
            from optimize.pipeline.resident import Resident

            with closing(Resident()) as resident:
                _planned(read, embedded, memory, show_json if json_ else show, resident, measure_texts=False)
            return
        if sign is None:
            _carry_out(read, embedded, served, memory, json_, resume=resume, keep_rejected=keep_rejected)
            return
        from optimize.pipeline import signature

        key = signature.private_key(sign)
        _carry_out(read, embedded, served, memory, json_, resume=resume, keep_rejected=keep_rejected)
        signature.write(where, key)

    return optimize


def _verify_command(embedded: Embedded, served: Served) -> Callable[..., None]:
    def verify(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export of `loradock optimize`, or of others.")],
        model: Annotated[str, typer.Option("--model", help="What it came from, if not a model that comes along.")] = "",
        adapter: Annotated[list[str] | None, typer.Option("--adapter", help="NAME=FOLDER, each of its recipe.")] = None,
        data: Annotated[
            Path | None, typer.Option("--data", help="The folder with the recipe's own texts, examples and tasks.")
        ] = None,
        engine: Annotated[bool, typer.Option("--engine/--no-engine", help="Read the text in vLLM too.")] = True,
        rebuild: Annotated[
            bool, typer.Option("--rebuild", help="Carry out the whole recipe again, and compare the bytes.")
        ] = False,
        key: Annotated[
            Path | None, typer.Option("--key", help="The maker's public key (PEM): its signature is checked.")
        ] = None,
        expect: Annotated[
            list[str] | None, typer.Option("--expect", help="NAME=NUMBER, a figure that is claimed elsewhere.")
        ] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", help="What an export of others is measured on, as evaluate.text=FILE."),
        ] = None,
        memory: Memory = 0.0,
        json_: Annotated[bool, typer.Option("--json", help="What was found as JSON.")] = False,
    ) -> None:
        """Load an export anew, and hold what its manifest says against what is measured here.

        Its files are compared with their digests, its original and texts with theirs, and every score is measured
        again: in transformers, in vLLM, or in ONNX Runtime. Exit code 3 when a file or a figure differs.
        """
        from optimize.pipeline.available_memory import available_memory
        from optimize.pipeline.verify import Sources, Verify

        adapters = dict(_pair(word, "--adapter") for word in adapter or [])
        expected = {name: _number(value, name) for name, value in (_pair(word, "--expect") for word in expect or [])}
        with JsonLines() if json_ else Bars([]) as bars:
            found = Verify(
                folder.expanduser().resolve(),
                Sources(model, adapters, data and data.expanduser().resolve()),
                lambda name: find(name, embedded).resolve(),
                int(memory * 1e9) or available_memory(),
                bars,
                engine=engine,
                expected=expected,
                settings=dict(_pair(word, "--set") for word in set_ or []),
                served=served(),
            )(rebuild, key)
        if json_:
            _say(found.plain())
        else:
            _show_verification(found)
        if found.differing:
            raise Differs(f"{folder} is not what it says: {'; '.join(found.differing[:4])}")

    return verify


def _number(value: str, name: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise RecipeError(f"--expect {name} takes a number, not {value!r}") from None


def _show_verification(found: Any) -> None:
    if found.files:
        typer.echo(f"{found.files} files are those of the manifest")
    width = max((len(figure.name) for figure in found.figures), default=0)
    for figure in found.figures:
        claimed, measured = ("-" if value is None else f"{value:.6g}" for value in (figure.claimed, figure.measured))
        typer.echo(f"  {figure.name:<{width}}  {claimed:>12}  {measured:>12}  {figure.result}")
    for note in found.notes:
        typer.echo(f"  {note}")


def _model(model: str) -> str:
    """A folder here as its whole path; a recipe's own paths begin elsewhere."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _adapters(words: Sequence[str]) -> dict[str, str]:
    """name -> folder of what `--adapter` names."""
    pairs = (_pair(word, "--adapter") for word in words)
    return {name: str(Path(folder).expanduser().resolve()) for name, folder in pairs}


def _planned(
    recipe: Recipe, embedded: Embedded, memory_gb: float, show: Show, resident: Resident, measure_texts: bool
) -> tuple[Plan, int]:
    """The plan, which is shown, and the bytes that a step may use."""
    from optimize.pipeline import machine
    from optimize.pipeline import plan as plans
    from optimize.pipeline.available_memory import available_memory
    from optimize.pipeline.run import texts

    where = Path(recipe.output)
    model = find(recipe.model, embedded)
    memory = int(memory_gb * 1e9) or available_memory()
    measured = partial(machine.measured, recipe, model, resident)
    plan = plans.made(recipe, model, texts(recipe) if measure_texts else {}, where, memory, measured)
    show(plan, where)
    return plan, memory


def _carry_out(recipe: Recipe, embedded: Embedded, served: Served, memory_gb: float, as_json: bool, **how: Any) -> None:
    """Plan, run and say so; `how` is what Run takes beside."""
    from optimize.pipeline import manifest
    from optimize.pipeline.resident import Resident
    from optimize.pipeline.run import Run

    with closing(Resident()) as resident:
        show_plan = show_json if as_json else show
        plan, memory = _planned(recipe, embedded, memory_gb, show_plan, resident, measure_texts=True)
        shown: JsonLines | Bars = JsonLines() if as_json else Bars([each.kind for each in plan.steps[:-1]])
        with shown as bars:
            where = Path(recipe.output)
            result = Run(recipe, plan, where, memory, bars, served=served(), resident=resident, **how)()
    if as_json:
        _say({"done": str(result)})
        return
    typer.echo(f"done: {result}")
    if not manifest.judged(manifest.of(result)):
        typer.echo("  not judged: the recipe has no `gate:`, and nothing was held against the result")
    if recipe.export.format == "vllm":
        typer.echo(f"  loradock serve {shlex.quote(str(result))}")
    elif recipe.export.format == "gguf":
        typer.echo(f"  loradock serve {shlex.quote(str(result / 'model.gguf'))}")
    elif recipe.export.format == "adapter":
        typer.echo(f"  loradock adapters push NAME {shlex.quote(str(result))}")
    else:
        typer.echo(f"  report: {result / 'report' / 'report.md'}")


def find(model: str, embedded: Embedded) -> Path:
    """The directory of the model: a path, one that comes along, or a hub id."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        raise Refused(
            f"{model} is a file, and a recipe begins with a checkpoint's directory, which has a config.json and "
            "safetensors; for a GGUF file name the model that it was made of"
        )
    if model.startswith(("/", ".")):
        raise Refused(f"there is no model directory {model}")
    if "/" not in model:
        try:
            return embedded(model)
        except Exception as error:
            raise Refused(str(error)) from error
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:
        raise Refused(f"{model} could not be fetched from the hub: {' '.join(str(error).split())[:300]}") from error


def show(plan: Plan, where: Path) -> None:
    """The plan as a table."""
    typer.echo(f"{plan.model.name} to {where}")
    for number, step in enumerate(plan.steps, 1):
        needs = f"{step.memory / 1e9:5.1f} GB memory  {step.disk / 1e6:6.0f} MB disk  {_time(step.seconds):>8}"
        typer.echo(f"  {number}. {step.kind:<9} {needs}  {step.what}")
        if step.warning:
            typer.echo(f"     {'':<9} {step.warning}")
    typer.echo(
        f"  at most {plan.memory / 1e9:.1f} GB memory, {plan.disk / 1e6:.0f} MB disk, about {_time(plan.seconds)}"
    )
    if plan.note:
        typer.echo(f"  {plan.note}")


def show_json(plan: Plan, where: Path) -> None:
    """The plan as one line of JSON."""
    names = ("kind", "what", "memory", "disk", "seconds", "warning")
    steps = [{name: getattr(step, name) for name in names} for step in plan.steps]
    _say({"model": plan.model.name, "output": str(where), "steps": steps, "memory": plan.memory, "disk": plan.disk,
          "seconds": round(plan.seconds, 1), "note": plan.note})  # fmt: skip


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


class JsonLines:
    """Progress as JSON on standard output, an object a line."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, kind: str, done: float, total: float, what: str) -> None:
        _say({"step": kind, "done": done, "total": total, "what": what})


class Pace:
    """How long a step still takes at the pace of what it does now. Loading is no part of it, and each total is a count
    of other things."""

    def __init__(self) -> None:
        self._begun: tuple[float, float, float] = (0.0, 0.0, 0.0)  # when, and how much of what total was done then
        self._done = 0.0

    def left(self, now: float, done: float, total: float) -> float | None:
        """Seconds, or None before anything was done."""
        if total != self._begun[2] or done < self._done:
            self._begun = now, done, total
        self._done = done
        begun, before, _ = self._begun
        return (now - begun) * (total - done) / (done - before) if before < done < total else None


class Bars:
    """Progress with the time left: bars in a terminal, a line every 15 seconds elsewhere."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds
        self.finished = 0
        self._printed_at = 0.0
        self._begun = time.monotonic()
        self._pace = Pace()
        self._step = ""
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> Bars:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self._bars = Progress(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, kind: str, done: float, total: float, what: str) -> None:
        label = f"[{self.finished + 1}/{len(self.kinds)}] {kind}" if self.kinds else kind
        over = done >= total and what in ("", "done before")
        begins = self._step != label
        if begins:
            self._step = label
            self._pace = Pace()
            if self._bars is not None:
                self._task = self._bars.add_task(label.replace("[", r"\["), total=1.0, what="")
        if self._bars is not None:
            self._bars.update(self._task, completed=1.0 if over else min(done / total, 0.999), what=what)
        else:
            self._print(label, done, total, what, begins or over)
        if over:
            self.finished += 1
            self._begun = time.monotonic()

    def _print(self, label: str, done: float, total: float, what: str, always: bool) -> None:
        """A line, if the last one is long enough ago."""
        now = time.monotonic()
        seconds = self._pace.left(now, done, total)
        if always or now - self._printed_at > EVERY:
            self._printed_at = now
            left = "" if seconds is None else f", {_time(seconds)} left"
            message = what or f"done in {_time(now - self._begun)}"
            print(f"{label} {done / total:4.0%}  {message}{left}", file=sys.stderr, flush=True)


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Examples to train on, a JSON object a line.")],
    method: Annotated[
        Literal["supervised", "dpo", "kto", "classify"], typer.Option(help="What they are for.")
    ] = "supervised",
    fewest: Annotated[int, typer.Option(help="Examples that the file has to have.")] = examples.FEWEST,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The folder of the model to train: examples too long for it are told."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="What was found as JSON.")] = False,
) -> None:
    """Say what is wrong with a file of examples, line by line, before any training; exit code 2 when something is."""
    found = examples.checked(file, method, fewest)
    if model is not None and not found.problem_count:
        from optimize.steps.tune.rules import too_long

        for overlong, why in too_long(file, method, found, model):
            found.add(overlong, why)
    if json_:
        _say(found.plain())
    elif not found.problem_count:
        typer.echo(f"{file.name}: {found.examples} {found.format} examples")
    for line, reason in [] if json_ else found.problems:
        typer.echo(reason if line is None else f"Line {line}: {reason}", err=True)
    if found.problem_count:
        raise typer.Exit(2)


def _validate_command(embedded: Embedded) -> Callable[..., None]:
    def validate(
        adapter: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter's folder.")],
        model: Annotated[str, typer.Option("--model", help="What it was trained on.")] = "smollm2",
        train: Annotated[Path | None, typer.Option("--train", help="The examples it was trained on.")] = None,
        validation: Annotated[Path | None, typer.Option("--validation", help="Held-out examples.")] = None,
        method: Annotated[Literal["supervised", "dpo", "kto"], typer.Option(help="What they are for.")] = "supervised",
        suite: Annotated[
            str, typer.Option("--suite", help="A JSON file in the place of the suite that comes along.")
        ] = "default",
        json_: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    ) -> None:
        """Report what an adapter did to its base: what it forgot, whether it refuses as before, what it leaks.

        Exit code 3 when a check failed or is undecided.
        """
        from optimize.steps.tune.validation import PASSED, of_files

        learned, unseen = (str(file) if file else "" for file in (train, validation))
        report = of_files(find(model, embedded), adapter, learned, unseen, method, suite)
        if json_:
            _say(report)
        else:
            for check in report["checks"]:
                interval = f"({check['low']:.3f} to {check['high']:.3f}), at most {check['limit']:g}"
                numbers = f"{check['measured']:8.3f} {interval}"
                typer.echo(f"  {check['name']:<13} {check['verdict']:<9} {numbers:<44} {check['what']}")
            for each in report.get("lost", []):
                typer.echo(f"    {each['question']} {each['says']}, not {each['answer']}")
        if report["verdict"] != PASSED:
            bad = [f"{check['name']} {check['verdict']}" for check in report["checks"] if check["verdict"] != PASSED]
            raise Differs(f"{adapter}: {'; '.join(bad) or report.get('problem', 'nothing was measured')}")

    return validate


def _tune_command(embedded: Embedded) -> Callable[..., None]:
    def tune(
        folder: Annotated[
            Path, typer.Argument(metavar="DIR", help="A folder with a recipe.yaml that trains an adapter.")
        ],
        memory: Memory = 0.0,
    ) -> None:
        """Train the adapter of DIR/recipe.yaml, or go on where an earlier start of this command was.

        DIR gets `adapter/` at the end, `progress.jsonl` with a line a step and `checkpoints/` with the adapter of each
        epoch meanwhile, and error.json when it does not end well. SIGTERM saves and stops with exit code 4, SIGTSTP and
        SIGCONT suspend.
        """
        if not folder.is_dir():
            raise RecipeError(f"{folder} is no folder: give the one that has the recipe.yaml")
        failed = folder / "error.json"
        failed.unlink(missing_ok=True)
        try:
            read = recipes.load(folder / "recipe.yaml")
            if not read.trains_alone:
                raise RecipeError("the recipe of a training has tune steps alone and `export: {format: adapter}`")
            read = recipes.changed(read, output=str((folder / "adapter").resolve()))
            _carry_out(read, embedded, dict, memory, False, resume=True, watched=folder.resolve())
        except OptimizeError as error:
            _leave(failed, error)
            raise

    return tune


def _leave(file: Path, error: OptimizeError) -> None:
    """The error for whoever started this; a folder that takes no file does not hide it."""
    said = {"class": type(error).__name__, "message": error.message, "code": error.exit_code}
    try:
        file.write_text(json.dumps(said) + "\n")
    except OSError:
        pass


def run_onnx(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export of `loradock optimize` in ONNX format.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    tokens: Annotated[int, typer.Option("--tokens", help="At most so many.")] = 64,
    adapter: Annotated[str, typer.Option("--adapter", help="With this one of the export's adapters.")] = "",
) -> None:
    """Ask an ONNX export a question with ONNX Runtime: a greedy answer as it comes, and how fast it came."""
    from optimize.export.session import Answer

    answer = Answer(folder, prompt, tokens, adapter)
    for piece in answer:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo("")
    typer.echo(f"({answer.speed:.1f} tokens/s, {answer.session.device})", err=True)


def setup_optimum() -> None:
    """Install what `export: {exporter: optimum}` needs: optimum and transformers 4 in a folder of the cache (71 MB).

    They cannot stand beside vLLM's transformers 5. Five packages come from wherever pip is set up to look, each with
    its pinned hash; torch and ONNX Runtime are shared. Nothing that is installed changes.
    """
    from optimize.export import optimum

    where = optimum.set_up()
    typer.echo(f"optimum exports {len(optimum.families())} model types; its packages are in {where}")


def _pair(word: str, flag: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise RecipeError(f"{flag} takes NAME=VALUE, not {word!r}")
    return name, value


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _directories_alone(name: str) -> Path:
    raise Refused(f"the model {name!r} comes along with the command `loradock optimize`; name a directory here")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], _directories_alone))
