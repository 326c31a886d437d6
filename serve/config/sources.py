"""Where settings come from, in rising order of right: defaults, a file, the environment, the command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from serve.config.checks import checked
from serve.config.engine_options import REFUSED, engine_options, is_switch
from serve.config.settings import SETTINGS, Base, Config
from serve.config.values import converted, read_yaml
from serve.errors import ConfigError
from serve.models.checkpoint import default_name
from serve.telemetry.tracing.tracing_settings import TracingSettings

PREFIX = "LORADOCK_"


def load(arguments: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """The Config that a command line and an environment ask for; ConfigError names what is wrong in one sentence."""
    flags = dict(_from_flags(list(arguments)))
    file = flags.pop("config", None) or environ.get(PREFIX + "CONFIG")
    values: dict[str, Any] = {}
    for source in (_from_file(file) if file else {}, _from_environ(environ), flags):
        values.update(source)
    engines = values.pop("engines", ())
    ours = {name: converted(name, SETTINGS[name].kind, value) for name, value in values.items() if name in SETTINGS}
    # The rest is the engine's, as it came.
    rest = {name: value for name, value in values.items() if name not in SETTINGS and name != "config"}
    otel = TracingSettings.of(environ)
    return checked(Config(**ours, engine=MappingProxyType(rest), engines=engines, otel=otel))


def _known() -> set[str]:
    return {"config", *SETTINGS, *engine_options()} - set(REFUSED)


def _name(raw: str, where: str) -> str:
    """A setting's name from how it was written in `where`; an unknown one is an error that names the nearest."""
    name = raw.replace("-", "_").lower()
    if name in REFUSED:
        raise ConfigError(f"{where} {_spelled(name, where)} is not taken: {REFUSED[name]}")
    if name not in _known():
        near = difflib.get_close_matches(name, _known(), n=1, cutoff=0.5)
        hint = f"; did you mean {_spelled(near[0], where)}?" if near else ""
        raise ConfigError(f"{where} {_spelled(name, where)} is not known{hint} (`loradock serve --help` lists them)")
    return name


def _spelled(name: str, where: str) -> str:
    if where == "the flag":
        return "--" + name.replace("_", "-")
    return PREFIX + name.upper() if where == "the variable" else name


def _is_switch(name: str) -> bool:
    return SETTINGS[name].kind is bool if name in SETTINGS else is_switch(name)


def _from_flags(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    """(name, value) from a command line of `MODEL`, `--name value`, `--name=value`, `--switch` and `--no-switch`."""
    model_given = False
    while arguments:
        word = arguments.pop(0)
        if not word.startswith("--"):
            if model_given or word.startswith("-"):
                raise ConfigError(
                    f"the argument {word!r} is one too many: `loradock serve [MODEL] [--setting value ...]`"
                )
            model_given = True
            yield "model", word
            continue
        raw, equals, value = word[2:].partition("=")
        bare = raw.replace("-", "_").lower()
        if bare.startswith("no_") and bare not in _known() and _is_switch(bare[3:]):
            yield bare[3:], "false"
        elif equals:
            yield _name(raw, "the flag"), value
        elif _is_switch(name := _name(raw, "the flag")):
            yield name, "true"
        elif not arguments or arguments[0].startswith("--"):
            raise ConfigError(f"the flag --{raw} needs a value")
        else:
            yield name, arguments.pop(0)


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """LORADOCK_*; a few of those names belong to the client commands, one to those who try the kernels."""
    others = {"CONFIG", "URL", "KEY", "CPU_MARCH"}
    names = {key: key[len(PREFIX) :] for key in environ if key.startswith(PREFIX)}
    return {_name(name, "the variable"): environ[key] for key, name in names.items() if name not in others}


def _from_file(file: str) -> dict[str, Any]:
    try:
        read = read_yaml(Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"the config file {file} must hold `setting: value` lines")
    more = [_base(entry, file) for entry in _entries(read.pop("engines", None) or [], file)]
    engine = _named(_section(read.pop("engine", None) or {}, file), file)
    settings = _named(read, file)
    if both := sorted(settings.keys() & engine.keys()):
        raise ConfigError(f"{both[0]} is in {file} twice, at the top and under `engine:`: keep one of them")
    settings |= engine
    return {**settings, "engines": tuple(more)} if more else settings


def _named(values: Mapping[Any, Any], file: str) -> dict[str, Any]:
    """Settings under their names; one that is written in two ways, as max-loras and max_loras, is an error."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if (name := _name(str(key), "the key")) in named:
            raise ConfigError(f"{name} is in {file} twice, once as {str(key)!r}: keep one of them")
        named[name] = value
    return named


def _entries(engines: Any, file: str) -> list[dict[str, Any]]:
    if not isinstance(engines, list) or not all(isinstance(entry, dict) for entry in engines):
        raise ConfigError(f"`engines:` in {file} must be a list of entries with `model:`, `name:` and `engine:`")
    return engines


def _base(entry: dict[str, Any], file: str) -> Base:
    """One further base model, with options of its own."""
    unknown = sorted(set(map(str, entry)) - {"name", "model", "engine"})
    if unknown or not isinstance(entry.get("model"), str):
        odd = f"{unknown[0]!r} is not known there" if unknown else "it needs a `model:`"
        raise ConfigError(f"an entry of `engines:` in {file} takes name, model and engine: {odd}")
    options = _named(_section(entry.get("engine") or {}, file), file)
    if ours := sorted(set(options) & set(SETTINGS)):
        raise ConfigError(f"{ours[0]!r} is the whole server's setting, not an engine's: move it to the top of {file}")
    model = entry["model"]
    return Base(str(entry.get("name") or default_name(model)), model, MappingProxyType(options))


def _section(section: Any, file: str) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise ConfigError(f"`engine:` in {file} must hold `option: value` lines")
    return section
