"""What the user asked for, as frozen models read from YAML; an unknown key is an error that names the nearest.

A recipe names a model, the adapters that must keep working on it, the steps, how the result is measured, what it has to
reach, and where it goes. `--list` shows the recipes that come along.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from optimize import plugins
from optimize.errors import RecipeError
from optimize.options import Evaluate, Export, Gate, Part, Step, Text

SECTIONS: Mapping[str, type[Part]] = {"calibration": Text, "evaluate": Evaluate, "gate": Gate, "export": Export}


class Recipe(Part, frozen=True, kw_only=True):
    """The whole of it. Paths are absolute: a recipe's own are relative to the file.

    `target` is what will serve the result, `device` what computes it: `auto` a GPU, where there is one with room.
    """

    model: str = "smollm2"
    adapters: Mapping[str, str] = {}
    seed: int = 0
    target: Literal["cpu", "gpu"] = "cpu"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    steps: tuple[Step, ...] = ()
    calibration: Text = Text()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    export: Export = Export()
    output: str = ""

    @property
    def trains_alone(self) -> bool:
        """Whether all that it makes is trained adapters, which have held-out examples of their own: then no text is
        read, and nothing else is measured."""
        return self.export.format == "adapter" and all(step.trains for step in self.steps)

    @property
    def rounds(self) -> bool:
        """Whether weights have fewer bits afterwards."""
        return self.export.rounds or any(step.quantizes for step in self.steps)


def load(source: str | Path, overrides: Mapping[str, str] | None = None, **instead: Any) -> Recipe:
    """The recipe in a YAML file, or the one that comes along under this name. `instead`: as `made` takes it."""
    path = Path(source)
    if not path.suffix and not path.is_file():  # a folder may have the name: what an earlier run made of it
        file = resources.files("optimize") / "recipes" / f"{source}.yaml"
        if not file.is_file():
            near = _nearest(str(source), shipped())
            raise RecipeError(
                f"there is no recipe {source!r}{near}; `loradock optimize --list` shows those that come along"
            )
        return parse(file.read_text(), Path.cwd(), overrides, **instead)
    try:
        written = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {source} cannot be read: {error}") from error
    return parse(written, path.resolve().parent, overrides, **instead)


def parse(written: str, folder: Path, overrides: Mapping[str, str] | None = None, **instead: Any) -> Recipe:
    """A recipe from its YAML."""
    try:
        read = yaml.load(written, _Once) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise RecipeError("a recipe holds `key: value` lines, such as `model:` and `steps:`")
    return made(read, folder, overrides, **instead)


def made(
    read: dict[str, Any],
    folder: Path,
    overrides: Mapping[str, str] | None = None,
    model: str = "",
    adapters: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe of what its YAML says; `folder` is where its relative paths begin. On top lie `overrides`, dotted keys
    with their YAML, a model and adapters, whose names and paths may have any letters."""
    for dotted, value in (overrides or {}).items():
        _set(read, dotted, value)
    if model:
        read["model"] = model
    if adapters:
        read["adapters"] = {**_mapping(read.get("adapters"), "adapters"), **adapters}
    for key in read:
        step = difflib.get_close_matches(str(key), step_kinds(), n=1, cutoff=0.75)
        if step and key not in Recipe.__struct_fields__:
            raise RecipeError(
                f"the recipe has the key {key!r} at its top; {step[0]} is a step: `steps: [{{{step[0]}: ...}}]`"
            )
    _known(read, Recipe, "the recipe")
    fields: dict[str, Any] = {key: value for key, value in read.items() if key not in ("steps", *SECTIONS)}
    if "adapters" in fields:
        fields["adapters"] = {
            str(name): _path(str(where), folder) for name, where in _mapping(fields["adapters"], "adapters").items()
        }
    for section, made in SECTIONS.items():
        if section in read:
            fields[section] = _part(_mapping(read[section], section), made, section)
    fields["steps"] = tuple(_step(step, at, folder) for at, step in enumerate(_list(read.get("steps") or []), 1))
    recipe = _convert(fields)
    texts = {
        section: msgspec.structs.replace(part, text=_text(part.text, folder))
        for section, part in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate))
    }
    own = tuple(_path(name, folder) if name.endswith((".yaml", ".yml")) else name for name in recipe.evaluate.tasks)
    each = {name: _text(where, folder) for name, where in recipe.evaluate.adapter_texts.items()}
    texts["evaluate"] = msgspec.structs.replace(texts["evaluate"], tasks=own, adapter_texts=each)
    model = _path(recipe.model, folder) if recipe.model.startswith((".", "/", "~")) else recipe.model
    output = _path(recipe.output, folder) if recipe.output else ""
    recipe = msgspec.structs.replace(recipe, model=model, output=output, **texts)
    _check(recipe)
    return recipe


def shipped() -> dict[str, str]:
    """name -> what it is for, from the recipe's first comment line."""
    purposes = {}
    for file in sorted((resources.files("optimize") / "recipes").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            purposes[file.name.removesuffix(".yaml")] = file.read_text().splitlines()[0].removeprefix("# ")
    return purposes


def step_kinds() -> Mapping[str, Any]:
    """Every kind of step by its name, `optimize.steps.kind.StepKind`s: found in the steps' folder and in packages."""
    return plugins.found("optimize.steps", "loradock.optimize.steps", "STEP", "rules")


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some of its fields changed."""
    return msgspec.structs.replace(recipe, **changes)


class _Once(yaml.SafeLoader):
    """A key that is there twice is an error: of two values YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise RecipeError(f"the recipe has {key.value!r} twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _step(step: Any, at: int, folder: Path) -> Part:
    where, kinds = f"step {at}", step_kinds()
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, dict) or len(step) != 1:
        raise RecipeError(
            f"{where} holds one of {', '.join(kinds)} with its options, such as `- quantize: {{scheme: w8a8}}`"
        )
    ((kind, options),) = step.items()
    if kind not in kinds:
        raise RecipeError(
            f"{where} is {kind!r}, which is not a step{_nearest(str(kind), kinds)}; there is {', '.join(kinds)}"
        )
    chosen_options = _mapping(options or {}, f"{where}, {kind}")
    if isinstance(chosen_options.get("pattern"), int):  # YAML reads 2:4 as sixties, 124
        chosen_options = {**chosen_options, "pattern": "{}:{}".format(*divmod(chosen_options["pattern"], 60))}
    options_type = kinds[kind].options
    for name in options_type.files:
        if isinstance(file := chosen_options.get(name), str) and file:
            chosen_options = {**chosen_options, name: _path(file, folder)}
    return _part(chosen_options, options_type, f"{where}, {kind}")


def _part(options: dict[str, Any], made: type[Part], where: str) -> Part:
    _known(options, made, where)
    try:
        part: Part = msgspec.convert(options, made, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{where}: {_in_words(error)}") from error
    for name in options:
        value = getattr(part, name)
        for number in value if isinstance(value, tuple) else (value,):
            # No bound of NaN holds, and no weight of it computes.
            if isinstance(number, float) and not math.isfinite(number):
                raise RecipeError(f"{where}: {name} takes finite numbers, not {number}")
    return part


def _convert(fields: dict[str, Any]) -> Recipe:
    ready = {name: fields.pop(name) for name in ("steps", *SECTIONS) if name in fields}
    try:
        checked = msgspec.convert(fields, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"the recipe: {_in_words(error)}") from error
    return msgspec.structs.replace(checked, **ready)


def _in_words(error: Exception) -> str:
    """msgspec's `Expected `int`, got `str` - at `$.layers`` as a sentence."""
    what, _, where = str(error).partition(" - at ")
    key = where.strip("`").removeprefix("$").removeprefix(".")
    return f"{key + ': ' if key else ''}{what[0].lower()}{what[1:]}"


def _known(options: Mapping[str, Any], made: type[Part], where: str) -> None:
    names = [field.name for field in msgspec.structs.fields(made)]
    for key in options:
        if key not in names:
            raise RecipeError(f"{where} has no key {key!r}{_nearest(str(key), names)}; it takes {', '.join(names)}")


def _nearest(word: str, names: Any) -> str:
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{where} holds `key: value` lines, not {value!r}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RecipeError(f"steps is a list of `- step: {{options}}` lines, not {value!r}")
    return value


def _set(read: dict[str, Any], dotted: str, value: str) -> None:
    """`evaluate.engine=false` on the command line."""
    *path, last = dotted.split(".")
    for key in path:
        if read.get(key) is None:  # absent, or a key with nothing behind it
            read[key] = {}
        read = read[key]
        if not isinstance(read, dict):
            raise RecipeError(f"--set {dotted}: {key} is not a section")
    try:
        read[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {dotted}: {value!r} is not YAML: {' '.join(str(error).split())}") from error


def _text(value: str, folder: Path) -> str:
    if value.startswith("hf:") and not re.fullmatch(r"hf://datasets/[^/@]+/[^/@]+(@[^/]+)?/.+", value):
        raise RecipeError(f"{value!r} is no dataset's files: write hf://datasets/ORG/NAME/data/train-*.parquet")
    return value if value == "default" or value.startswith("hf:") else _path(value, folder)


def _path(value: str, folder: Path) -> str:
    return str((folder / Path(value).expanduser()).resolve())


def _check(recipe: Recipe) -> None:
    """What types cannot say: the bounds of each step, what goes before what, and what the gate can ask for."""
    if bad := [name for name in recipe.adapters if not name or "/" in name or name.startswith(".")]:
        raise RecipeError(f"an adapter's name is a plain word, not {bad[0]!r}")
    adapters = set(recipe.adapters)
    for at, step in enumerate(recipe.steps, 1):
        where = f"step {at}, {step.kind}"
        step.check(where)
        for name in step.consumed:
            if name not in adapters:
                near = _nearest(name, adapters)
                raise RecipeError(f"{where}: there is no adapter {name!r}{near}; add it to `adapters:`")
        if step.makes in adapters:
            raise RecipeError(f"{where}: the new adapter needs a plain name of its own, not {step.makes!r}")
        adapters |= {step.makes} if step.makes else set()
        step.check_order(where, recipe.steps[: at - 1], recipe.steps[at:])
    _check_counts(recipe)
    if unknown := sorted(set(recipe.evaluate.adapter_texts) - adapters):
        raise RecipeError(f"evaluate: adapter_texts has {unknown[0]!r}, and there is no such adapter"
                          f"{_nearest(unknown[0], adapters)}")  # fmt: skip
    _check_gate(recipe)
    if recipe.evaluate.tasks and recipe.export.format != "vllm":
        raise RecipeError("evaluate: tasks are scored on a vllm export")
    if recipe.export.format == "genai" and recipe.export.precision not in ("fp32", "int4"):
        raise RecipeError(f"export: genai is made in fp32 or int4, not {recipe.export.precision}")
    if recipe.export.format == "adapter" and not any(step.makes for step in recipe.steps):
        raise RecipeError("export: format adapter needs a combine or tune step that makes one")


def _check_counts(recipe: Recipe) -> None:
    for name, part in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate)):
        if part.samples < 1 or part.tokens < 8:
            raise RecipeError(f"{name}: samples is at least 1 and tokens at least 8")
    if not 0 <= recipe.seed < 1 << 63:
        raise RecipeError(f"seed is at least 0 and below 2**63, not {recipe.seed}")
    if recipe.evaluate.task_limit < 0 or recipe.export.shard_bytes < 1:
        raise RecipeError("evaluate: task_limit is at least 0, and export: shard_bytes above 0")


def _check_gate(recipe: Recipe) -> None:
    """A bound needs what measures it."""
    gate, measured = recipe.gate, {score for step in recipe.steps for score in step.measures}
    if gate.min_healed is not None and "healed" not in measured:
        raise RecipeError("gate: min_healed needs a heal step")
    if gate.max_valid_loss is not None and "valid_loss" not in measured:
        raise RecipeError("gate: max_valid_loss needs a tune step with a `validation` file")
    if gate.max_task_loss is not None and not recipe.evaluate.tasks:
        raise RecipeError("gate: max_task_loss needs `evaluate: {tasks: [...]}`")
    engine = recipe.evaluate.engine and recipe.export.format == "vllm"
    if not engine and (gate.min_speed is not None or gate.min_speed_16 is not None):
        raise RecipeError("gate: min_speed is measured in the engine: `evaluate: {engine: true}` and a vllm export")
