"""`loradock optimize`: run, plan or list recipes, and query an ONNX export.

Exit codes: 0 done, 1 a step failed, 2 the recipe is wrong or this machine cannot run it, 3 the gate is not passed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimize import recipe as recipes
from optimize.errors import OptimizeError, RecipeError, Refused

if TYPE_CHECKING:
    from optimize.pipeline.plan import Plan
    from optimize.recipe import Recipe

Embedded = Callable[[str], Path]
Served = Callable[[], dict[str, str]]
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
  loradock optimize run-onnx ./my-model-onnx "What is the capital of France?"
"""


def run(arguments: Sequence[str], embedded: Embedded, served: Served = dict) -> int:
    """The command with `arguments`; `embedded` gives the directory of a model that comes along, `served` the variables
    that an engine has when it is served on this machine. The exit code."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    if arguments and arguments[0] == "run-onnx":
        app.command("run-onnx", help=run_onnx.__doc__)(run_onnx)
        return _exit_code(app, arguments[1:], "loradock optimize run-onnx")
    app.command("optimize", help=HELP)(_optimize_command(embedded, served))
    return _exit_code(app, arguments, "loradock optimize")


def _exit_code(app: typer.Typer, arguments: Sequence[str], name: str) -> int:
    try:
        app(args=list(arguments), prog_name=name, standalone_mode=False)
    except OptimizeError as error:
        print(f"loradock: {error.message}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as ended:
        return int(ended.exit_code)
    except KeyboardInterrupt:
        print("loradock: stopped; go on with --resume", file=sys.stderr)
        return 130
    except Exception as error:  # typer's usage errors; their class depends on the click that typer uses
        if hasattr(error, "format_message"):
            print(f"loradock: {error.format_message()}", file=sys.stderr)
            return 2
        raise
    return 0


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
        memory: Annotated[
            float, typer.Option("--memory", help="GB that a step may use (default: 4/5 of what is free).")
        ] = 0.0,
    ) -> None:
        if list_:
            for name, what in recipes.shipped().items():
                typer.echo(f"{name:<16} {what}")
            return
        if not recipe:
            raise RecipeError("name a recipe: a YAML file, or one of those that `loradock optimize --list` shows")
        read = recipes.load(recipe, _overrides(model, adapter or [], set_ or []))
        where = (out or Path(read.output or f"./{Path(read.model).name}-optimized")).expanduser().resolve()
        read = recipes.changed(read, output=str(where))
        if plan:
            _planned(read, embedded, memory, measure_texts=False)
            return
        _carry_out(read, embedded, served, memory, resume, keep_rejected)

    return optimize


def _overrides(model: str, adapters: Sequence[str], settings: Sequence[str]) -> dict[str, str]:
    """What the command line says of the recipe, by the recipe's own keys."""
    overrides = dict(_pair(word, "--set") for word in settings)
    if model:
        relative = not Path(model).is_absolute() and Path(model).exists()
        overrides["model"] = str(Path(model).resolve()) if relative else model
    for word in adapters:
        name, folder = _pair(word, "--adapter")
        overrides[f"adapters.{name}"] = str(Path(folder).expanduser().resolve())
    return overrides


def _planned(recipe: Recipe, embedded: Embedded, memory_gb: float, measure_texts: bool) -> tuple[Plan, int]:
    """The plan, which is shown, and the bytes that a step may use."""
    from optimize.pipeline import plan as plans
    from optimize.pipeline.run import texts

    where = Path(recipe.output)
    model = find(recipe.model, embedded)
    memory = int(memory_gb * 1e9) or plans.available_memory()
    plan = plans.made(recipe, model, texts(recipe) if measure_texts else {}, where, memory)
    show(plan, where)
    return plan, memory


def _carry_out(
    recipe: Recipe, embedded: Embedded, served: Served, memory_gb: float, resume: bool, keep_rejected: bool
) -> None:
    from optimize.pipeline.run import Run

    plan, memory = _planned(recipe, embedded, memory_gb, measure_texts=True)
    with Bars([step.kind for step in plan.steps if step.kind != "export"]) as bars:
        result = Run(recipe, plan, Path(recipe.output), memory, bars, resume, keep_rejected, served())()
    typer.echo(f"done: {result}")
    if recipe.export.format == "vllm":
        typer.echo(f"  loradock serve {result}")
    else:
        typer.echo(f"  report: {result / 'report' / 'report.md'}")


def find(model: str, embedded: Embedded) -> Path:
    """The directory of the model: a path, one that comes along, or a hub id."""
    if Path(model).is_dir():
        return Path(model)
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


class Bars:
    """Progress with the time left: bars in a terminal, a line every 15 seconds elsewhere."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds
        self.finished = 0
        self._printed_at = 0.0
        self._begun = time.monotonic()
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
        label = f"[{self.finished + 1}/{len(self.kinds)}] {kind}"
        over = done >= total and what in ("", "done before")
        if self._step != label:
            self._step = label
            if self._bars is not None:
                self._task = self._bars.add_task(label.replace("[", r"\["), total=1.0, what="")
        if self._bars is not None:
            self._bars.update(self._task, completed=1.0 if over else min(done / total, 0.999), what=what)
        elif over or time.monotonic() - self._printed_at > EVERY:
            self._printed_at = time.monotonic()
            spent = self._printed_at - self._begun
            left = f", {_time(spent * (total - done) / done)} left" if 0 < done < total else ""
            message = what or f"done in {_time(spent)}"
            print(f"{label} {done / total:4.0%}  {message}{left}", file=sys.stderr, flush=True)
        if over:
            self.finished += 1
            self._begun = time.monotonic()


def run_onnx(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export of `loradock optimize` in ONNX format.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    tokens: Annotated[int, typer.Option("--tokens", help="At most so many.")] = 64,
) -> None:
    """Ask an ONNX export a question with ONNX Runtime: a greedy answer, and how fast it came."""
    from optimize.export.onnx import answered

    answer, speed = answered(folder, prompt, tokens)
    typer.echo(answer)
    typer.echo(f"({speed:.1f} tokens/s)", err=True)


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
