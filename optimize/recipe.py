"""What the user asked for, as frozen models read from YAML; an unknown key is an error that names the nearest.

A recipe names a model, the adapters that must keep working on it, the steps, how the result is measured, what it has to
reach, and where it goes. `--list` shows the recipes that come along.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from optimize.errors import RecipeError

Part = msgspec.Struct


class Text(Part, frozen=True, kw_only=True):
    """Text for calibration or evaluation: `default`, a .jsonl, .txt or .parquet file, a folder of .jsonl, as a server
    captures, or files of a dataset on the hub: `hf://datasets/ORG/NAME/PATTERN`, with `@REVISION` behind the name."""

    text: str = "default"
    column: str = "text"
    samples: int = 32
    tokens: int = 512


class Merge(Part, frozen=True, kw_only=True, tag="merge"):
    """LoRA adapters into the base's weights, one after another; into a quantized base only with `requantize`."""

    adapters: tuple[str, ...]
    weights: tuple[float, ...] = ()
    requantize: bool = False


class Combine(Part, frozen=True, kw_only=True, tag="combine"):
    """Several adapters into one adapter called `name`."""

    name: str
    adapters: tuple[str, ...]
    method: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "svd"
    weights: tuple[float, ...] = ()
    rank: int = 0
    density: float = 0.5


class Prune(Part, frozen=True, kw_only=True, tag="prune"):
    """Whole layers (`greedy`: those that calibration text misses least), a share of the MLP's width by activation,
    zeros, or a smaller vocabulary.

    `sparsity` is a share of zeros, `pattern` is N:M (2:4 keeps two of four); `vocabulary` is how many tokens stay, or
    `used` for those of the calibration text.
    """

    layers: int = 0
    choose: Literal["greedy", "influence"] = "greedy"
    mlp: float = 1.0
    sparsity: float = 0.0
    pattern: str = ""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    vocabulary: int | Literal["used"] = 0

    @property
    def zeros(self) -> bool:
        return bool(self.sparsity or self.pattern)


class Heal(Part, frozen=True, kw_only=True, tag="heal"):
    """Put back what a linear map can (`repair`), then distil the original into the pruned model through a LoRA that is
    merged."""

    repair: bool = True
    steps: int = 200
    rank: int = 32
    learning_rate: float = 1e-3
    batch: int = 4
    tokens: int = 256
    samples: int = 0


class Quantize(Part, frozen=True, kw_only=True, tag="quantize"):
    """Fewer bits. With mixed precision sensitive layers keep more: `budget` is what perplexity may rise by, `agreement`
    the least share of tokens that stay the likeliest.

    `format` gptq is for w4a16, and onnxruntime-genai's builder takes it too; `ignore` holds names of layers, their last
    words, or `re:` patterns.
    """

    scheme: Literal["w8a8", "w8a16", "w4a16", "fp8", "fp8-block", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"] = "w8a8"
    method: Literal["gptq", "awq", "rtn"] = "gptq"
    format: Literal["compressed-tensors", "gptq"] = "compressed-tensors"
    kv_cache: Literal["auto", "fp8"] = "auto"
    smooth: bool | Literal["auto"] = "auto"
    group: int = 0
    budget: float = 0.0
    agreement: float = 0.0
    ignore: tuple[str, ...] = ("lm_head",)


class Evaluate(Part, frozen=True, kw_only=True):
    """What the result is measured on. `tasks` are lm-eval's, or files of its kind, of `task_limit` questions each."""

    text: str = "default"
    column: str = "text"
    samples: int = 32
    tokens: int = 512
    prompts: tuple[str, ...] = (
        "What is the capital of France?",
        "Name three fruits.",
        "Write one sentence about the sea.",
    )
    engine: bool = True
    tasks: tuple[str, ...] = ()
    task_limit: int = 0


class Gate(Part, frozen=True, kw_only=True):
    """Bounds on what was measured; a bound that is not given is not held against the result."""

    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    max_size: float | None = None
    max_adapter_kl: float | None = None
    min_adapter_effect: float | None = None
    min_speed: float | None = None
    min_speed_16: float | None = None
    min_healed: float | None = None
    max_task_loss: float | None = None
    max_logit_difference: float | None = None


class Export(Part, frozen=True, kw_only=True):
    format: Literal["vllm", "onnx", "genai", "adapter"] = "vllm"
    precision: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    shard_bytes: int = 4_000_000_000


STEPS: Mapping[str, type[Part]] = {
    "merge": Merge,
    "combine": Combine,
    "prune": Prune,
    "heal": Heal,
    "quantize": Quantize,
}
SECTIONS: Mapping[str, type[Part]] = {"calibration": Text, "evaluate": Evaluate, "gate": Gate, "export": Export}


class Recipe(Part, frozen=True, kw_only=True):
    """The whole of it. Paths are absolute: a recipe's own are relative to the file."""

    model: str = "smollm2"
    adapters: Mapping[str, str] = {}
    seed: int = 0
    target: Literal["cpu", "gpu"] = "cpu"
    steps: tuple[Merge | Combine | Prune | Heal | Quantize, ...] = ()
    calibration: Text = Text()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    export: Export = Export()
    output: str = ""


KIND = {made: kind for kind, made in STEPS.items()}


def load(source: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file, or the one that comes along under this name."""
    path = Path(source)
    if not path.suffix and not path.exists():
        file = resources.files("optimize") / "recipes" / f"{source}.yaml"
        if not file.is_file():
            near = _nearest(str(source), shipped())
            raise RecipeError(
                f"there is no recipe {source!r}{near}; `loradock optimize --list` shows those that come along"
            )
        return parse(file.read_text(), Path.cwd(), overrides)
    try:
        written = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {source} cannot be read: {error}") from error
    return parse(written, path.resolve().parent, overrides)


def parse(written: str, folder: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from its YAML; `folder` is where its relative paths begin, and `overrides` are `key: value` on top."""
    try:
        read = yaml.safe_load(written) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise RecipeError("a recipe holds `key: value` lines, such as `model:` and `steps:`")
    for dotted, value in (overrides or {}).items():
        _set(read, dotted, value)
    _known(read, Recipe, "the recipe")
    fields: dict[str, Any] = {key: value for key, value in read.items() if key not in ("steps", *SECTIONS)}
    if "adapters" in fields:
        fields["adapters"] = {
            str(name): _path(str(where), folder) for name, where in _mapping(fields["adapters"], "adapters").items()
        }
    for section, made in SECTIONS.items():
        if section in read:
            fields[section] = _part(_mapping(read[section], section), made, section)
    fields["steps"] = tuple(_step(step, at) for at, step in enumerate(_list(read.get("steps") or []), 1))
    recipe = _convert(fields)
    texts = {
        section: msgspec.structs.replace(part, text=_text(part.text, folder))
        for section, part in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate))
    }
    own = tuple(_path(name, folder) if name.endswith((".yaml", ".yml")) else name for name in recipe.evaluate.tasks)
    texts["evaluate"] = msgspec.structs.replace(texts["evaluate"], tasks=own)
    model = _path(recipe.model, folder) if recipe.model.startswith((".", "/", "~")) else recipe.model
    output = _path(recipe.output, folder) if recipe.output else ""
    recipe = msgspec.structs.replace(recipe, model=model, output=output, **texts)
    _sensible(recipe)
    return recipe


def shipped() -> dict[str, str]:
    """name -> what it is for, from the recipe's first comment line."""
    found = {}
    for file in sorted((resources.files("optimize") / "recipes").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = file.read_text().splitlines()[0].removeprefix("# ")
    return found


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some of its fields changed."""
    return msgspec.structs.replace(recipe, **changes)


def plain(part: Part) -> dict[str, Any]:
    """A part as JSON's own types."""
    made: dict[str, Any] = msgspec.to_builtins(part)
    made.pop("type", None)
    return made


def _step(step: Any, at: int) -> Part:
    where = f"step {at}"
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, dict) or len(step) != 1:
        raise RecipeError(
            f"{where} holds one of {', '.join(STEPS)} with its options, such as `- quantize: {{scheme: w8a8}}`"
        )
    ((kind, options),) = step.items()
    if kind not in STEPS:
        raise RecipeError(
            f"{where} is {kind!r}, which is not a step{_nearest(str(kind), STEPS)}; there is {', '.join(STEPS)}"
        )
    given = _mapping(options or {}, f"{where}, {kind}")
    if isinstance(given.get("pattern"), int):  # YAML reads 2:4 as sixties, 124
        given = {**given, "pattern": "{}:{}".format(*divmod(given["pattern"], 60))}
    return _part(given, STEPS[kind], f"{where}, {kind}")


def _part(options: dict[str, Any], made: type[Part], where: str) -> Part:
    _known(options, made, where)
    try:
        return msgspec.convert(options, made, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{where}: {_said(error)}") from error


def _convert(fields: dict[str, Any]) -> Recipe:
    ready = {name: fields.pop(name) for name in ("steps", *SECTIONS) if name in fields}
    try:
        checked = msgspec.convert(fields, Recipe, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"the recipe: {_said(error)}") from error
    return msgspec.structs.replace(checked, **ready)


def _said(error: Exception) -> str:
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
        read = read.setdefault(key, {})
        if not isinstance(read, dict):
            raise RecipeError(f"--set {dotted}: {key} is not a section")
    read[last] = yaml.safe_load(value)


def pattern_of(pattern: str) -> tuple[int, int] | None:
    """(2, 4) from "2:4": two of four stay."""
    kept, colon, of = pattern.partition(":")
    return (int(kept), int(of)) if colon else None


def _prunes(step: Prune, where: str) -> None:
    wishes = [bool(step.layers) or step.mlp != 1.0, step.zeros, bool(step.vocabulary)]
    if sum(wishes) == 0:
        raise RecipeError(
            f"{where}: say `layers: N` to drop layers, `mlp: 0.875` to narrow the MLP, `vocabulary: N` to trim it, or "
            "`sparsity: 0.5` or `pattern: 2:4` for zeros"
        )
    if sum(wishes) > 1:
        raise RecipeError(
            f"{where}: structure, zeros and vocabulary are three steps; give each a `- prune:` of its own"
        )
    if step.layers < 0 or not 0 < step.mlp <= 1:
        raise RecipeError(f"{where}: layers is a count and mlp a share above 0 and at most 1")
    if step.sparsity and step.pattern:
        raise RecipeError(f"{where}: `sparsity` or `pattern`, not both; 2:4 is half of the weights")
    if step.zeros and not step.pattern and not 0 < step.sparsity < 1:
        raise RecipeError(f"{where}: sparsity is a share above 0 and below 1, not {step.sparsity}")
    if step.pattern and not re.fullmatch(r"[1-9]\d?:(4|8|16|32)", step.pattern):
        raise RecipeError(f"{where}: a pattern is N:M with M of 4, 8, 16 or 32, such as 2:4, not {step.pattern!r}")
    if step.pattern and int(step.pattern.split(":")[0]) >= int(step.pattern.split(":")[1]):
        raise RecipeError(f"{where}: {step.pattern} leaves no zeros; 2:4 keeps two of four")
    if step.vocabulary != "used" and step.vocabulary < 0:
        raise RecipeError(f"{where}: vocabulary is how many tokens stay, or `used`")


def _quantizes(step: Quantize, where: str) -> None:
    if step.scheme != "w4a16" and (step.method == "awq" or step.format == "gptq"):
        raise RecipeError(f"{where}: AWQ and the format gptq go with w4a16, not {step.scheme}")
    if step.method == "awq" and step.smooth is True:
        raise RecipeError(f"{where}: AWQ scales the channels itself; leave `smooth` out")
    if step.format == "gptq" and (step.budget or step.kv_cache == "fp8"):
        raise RecipeError(
            f"{where}: the format gptq knows one precision and no KV cache; leave budget and kv_cache out"
        )
    for pattern in step.ignore:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise RecipeError(f"{where}: ignore {pattern!r} is no regular expression: {error}") from error


def _text(value: str, folder: Path) -> str:
    if value.startswith("hf:") and not re.fullmatch(r"hf://datasets/[^/@]+/[^/@]+(@[^/]+)?/.+", value):
        raise RecipeError(f"{value!r} is no dataset's files: write hf://datasets/ORG/NAME/data/train-*.parquet")
    return value if value == "default" or value.startswith("hf:") else _path(value, folder)


def _path(value: str, folder: Path) -> str:
    return str((folder / Path(value).expanduser()).resolve())


def _sensible(recipe: Recipe) -> None:
    """What types cannot say."""
    names = set(recipe.adapters)
    if bad := [name for name in names if not name or "/" in name or name.startswith(".")]:
        raise RecipeError(f"an adapter's name is a plain word, not {bad[0]!r}")
    healed = quantized = trimmed = sparse = False
    for at, step in enumerate(recipe.steps, 1):
        where = f"step {at}, {KIND[type(step)]}"
        if isinstance(step, Merge | Combine):
            if not step.adapters:
                raise RecipeError(f"{where}: name at least one adapter")
            for name in step.adapters:
                if name not in names:
                    raise RecipeError(
                        f"{where}: there is no adapter {name!r}{_nearest(name, names)}; add it to `adapters:`"
                    )
            if (
                isinstance(step, Merge)
                and step.requantize
                and not any(isinstance(later, Quantize) for later in recipe.steps[at:])
            ):
                raise RecipeError(f"{where}: requantize wants a quantize step after it")
            if step.weights and len(step.weights) != len(step.adapters):
                raise RecipeError(f"{where}: {len(step.weights)} weights for {len(step.adapters)} adapters")
        if isinstance(step, Combine):
            if not 0 < step.density <= 1:
                raise RecipeError(f"{where}: density is above 0 and at most 1, not {step.density}")
            if not step.name or "/" in step.name or step.name in names:
                raise RecipeError(f"{where}: the new adapter needs a plain name of its own, not {step.name!r}")
            names.add(step.name)
        if isinstance(step, Prune):
            _prunes(step, where)
            trimmed = trimmed or bool(step.vocabulary)
            sparse = sparse or step.zeros
        if isinstance(step, Heal):
            if min(step.rank, step.batch, step.tokens) < 1 or step.learning_rate <= 0:
                raise RecipeError(f"{where}: rank, batch, tokens and learning_rate are above 0")
            if step.steps < 0 or not (step.steps or step.repair):
                raise RecipeError(f"{where}: steps is above 0, or 0 with `repair: true`")
            if quantized:
                raise RecipeError(f"{where}: heal before quantizing; a quantized model's weights cannot be trained")
            if trimmed:
                raise RecipeError(
                    f"{where}: heal before trimming the vocabulary; the original answers in its own tokens"
                )
            if sparse:
                raise RecipeError(f"{where}: healing changes every weight and would fill the zeros; heal before")
            healed = True
        if isinstance(step, Quantize):
            if quantized:
                raise RecipeError(f"{where}: the model is quantized already; one quantize step does all")
            _quantizes(step, where)
            if not (step.budget >= 0 and 0 <= step.agreement < 1):
                raise RecipeError(f"{where}: budget is a share at least 0, agreement one from 0 to below 1")
            if (step.budget or step.agreement) and step.scheme not in ("w4a16", "w8a8"):
                raise RecipeError(f"{where}: a budget or agreement goes with w4a16 or w8a8, not {step.scheme}")
            quantized = True
        elif quantized and not isinstance(step, Combine):
            raise RecipeError(
                f"{where}: the model is quantized by then, and changing it would mean to quantize again; "
                "put the step before"
            )
    for name, part in (("calibration", recipe.calibration), ("evaluate", recipe.evaluate)):
        if part.samples < 1 or part.tokens < 8:
            raise RecipeError(f"{name}: samples is at least 1 and tokens at least 8")
    if recipe.gate.min_healed is not None and not healed:
        raise RecipeError("gate: min_healed needs a heal step")
    if recipe.evaluate.tasks and recipe.export.format != "vllm":
        raise RecipeError("evaluate: tasks are scored on a vllm export")
    if recipe.gate.max_task_loss is not None and not recipe.evaluate.tasks:
        raise RecipeError("gate: max_task_loss needs `evaluate: {tasks: [...]}`")
    engine = recipe.evaluate.engine and recipe.export.format == "vllm"
    if not engine and (recipe.gate.min_speed is not None or recipe.gate.min_speed_16 is not None):
        raise RecipeError("gate: min_speed is measured in the engine: `evaluate: {engine: true}` and a vllm export")
    if recipe.export.format == "genai" and recipe.export.precision not in ("fp32", "int4"):
        raise RecipeError(f"export: genai is made in fp32 or int4, not {recipe.export.precision}")
    if recipe.export.format == "adapter" and not any(isinstance(step, Combine) for step in recipe.steps):
        raise RecipeError("export: format adapter needs a combine step that makes one")
