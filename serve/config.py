"""One frozen Config, and the only reader of files and environment.

A setting comes, in rising order of right, from its default, `loradock.yaml`, `LORADOCK_*` in the environment, and the
command line. Everything that vLLM's engine and OpenAI server take is a setting too, under vLLM's own name.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from serve.errors import ConfigError
from serve.rollout.policy import DEFAULT_POLICIES, Policy
from serve.rollout.policy import parse as parse_policies
from serve.telemetry.slo import DEFAULT_SLOS, Slo
from serve.telemetry.slo import parse as parse_slos

PREFIX = "LORADOCK_"
SECONDS = (
    *("grace_period", "max_wait", "client_timeout"),
    *("hang_timeout", "restart_wait", "restart_window", "drain_timeout"),
)
SIZES = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}

_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

# vLLM's options that this server answers for itself, and what to use instead.
OURS = {
    "api_key": "use api_keys and admin_keys",
    "lora_modules": "push adapters with `loradock adapters push`",
    "enable_lora": "adapters are always on here",
    "headless": "one server is one process here",
    "api_server_count": "one server is one process here",
    "grpc": "this server speaks HTTP",
    "grpc_port": "this server speaks HTTP",
    "uds": "use host and port",
    "middleware": "put a proxy in front",
    "uvicorn_log_level": "use log_level",
    "worker_extension_cls": "it is taken by this server",
}


def _xdg(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback) / "loradock"


def _setting(default: Any, help: str) -> Any:
    made = {"default_factory": default} if callable(default) else {"default": default}
    return field(metadata={"help": help}, **made)


@dataclass(frozen=True, slots=True)
class Base:
    """One base model of this server: what is loaded, under which name, with which of vLLM's options."""

    name: str
    model: str
    engine: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Config:
    """What this server was asked to be. `engine` holds vLLM's options as they were given, by vLLM's names."""

    model: str = _setting("smollm2", "a local directory, a hub id, an export of `loradock optimize`, or smollm2")
    name: str = _setting("", "the base model's public name (default: the last part of MODEL)")
    host: str = _setting("127.0.0.1", "address to listen on; any but loopback needs keys")
    port: int = _setting(8000, "port to listen on")
    data_dir: Path = _setting(lambda: _xdg("XDG_DATA_HOME", ".local/share"), "where adapters and the registry live")
    cache_dir: Path = _setting(lambda: _xdg("XDG_CACHE_HOME", ".cache"), "where the embedded model is kept")
    registry: str = _setting("", "database URL of the registry (default: SQLite in data_dir)")
    blobs: str = _setting("", "folder by URL where all servers of one registry keep adapters, as s3://bucket/prefix")
    api_keys: tuple[str, ...] = _setting(tuple, "keys that may ask for answers (or their sha256:HEX)")
    admin_keys: tuple[str, ...] = _setting(tuple, "keys that may also change adapters (or their sha256:HEX)")
    max_upload_bytes: int = _setting(1 << 30, "largest adapter upload, as 512MiB or in bytes")
    probe: bool = _setting(True, "whether an upload must change what the base says")
    probe_min_effect: float = _setting(0.08, "how far it must move the log-probabilities, in nats on average")
    probe_max_perplexity: float = _setting(0.0, "how many times the base's perplexity it may have (0: any)")
    lora_kernels: str = _setting(
        "auto", "on a CPU: auto, layers, compile (torch.compile too), or off for vLLM's own path"
    )
    cpu_weights: str = _setting(
        "auto", "on a CPU: auto (as in the checkpoint), or int8 for bfloat16 ones: faster, rounded"
    )
    max_adapter_rank: int = _setting(0, "largest rank of an upload (0: the engine's max_lora_rank)")
    allowed_target_modules: tuple[str, ...] = _setting(tuple, "modules that uploads may adapt, as q_proj,v_proj")
    allowed_licenses: tuple[str, ...] = _setting(tuple, "licenses of uploads, as apache-2.0,mit, from their README.md")
    allowed_digests: tuple[str, ...] = _setting(tuple, "digests of the uploads that were approved, and no others")
    max_labelled_versions: int = _setting(100, "adapter versions that have metrics of their own; the rest are `other`")
    max_shadows: int = _setting(2, "shadow answers under way at a time; what comes beyond is dropped and counted")
    source_roots: tuple[str, ...] = _setting(tuple, "folders that a push by tenant default may name as file:///...")
    grace_period: float = _setting(30.0, "seconds that running answers get to finish when the server stops")
    max_wait: float = _setting(30.0, "seconds in line that a request is let in for; who would wait longer gets a 429")
    client_timeout: float = _setting(60.0, "seconds that a client may let the server wait, while it sends or reads")
    hang_timeout: float = _setting(300.0, "seconds without a step, while requests wait, after which an engine is dead")
    restart_wait: float = _setting(60.0, "seconds that a request waits for an engine that is coming back")
    max_restarts: int = _setting(5, "restarts of an engine within restart_window; after one more death it stays down")
    restart_window: float = _setting(600.0, "seconds that a death of an engine is remembered")
    drain_timeout: float = _setting(600.0, "seconds that answers of an engine that was replaced get to finish")
    swap_tolerance: float = _setting(0.5, "part of an adapter's effect that a swap of its base may lose or change")
    ssl_certfile: str = _setting("", "TLS certificate file")
    ssl_keyfile: str = _setting("", "TLS key file")
    drift: bool = _setting(True, "whether adapter versions are watched for drift")
    drift_threshold: float = _setting(1e5, "requests until a false alarm of one signal, in the mean, at least")
    drift_reference: int = _setting(1000, "first requests of a version that later ones are held against")
    drift_interval: float = _setting(600.0, "seconds in which one conversation counts once")
    drift_logprobs: float = _setting(0.05, "share of the requests whose log-probabilities are looked at, unseen")
    drift_probe_interval: float = _setting(3600.0, "seconds between two probes of a version (0: only when it loads)")
    drift_versions: int = _setting(200, "adapter versions that are watched at a time; others wait on the disk")
    capture: bool = _setting(False, "whether drift reports may quote requests")
    capture_text: bool = _setting(False, "whether requests are kept as text in the data directory, to calibrate on")
    capture_redact: tuple[str, ...] = _setting(tuple, "regular expressions that are blacked out in what is captured")
    capture_hours: float = _setting(24.0, "hours until a captured request is forgotten")
    policies: tuple[Policy, ...] = _setting(lambda: DEFAULT_POLICIES, "what to do about canaries, by adapter (README)")
    slos: tuple[Slo, ...] = _setting(lambda: DEFAULT_SLOS, "service level objectives, by adapter (see README)")
    ray: bool = _setting(False, "serve with replicas on a Ray cluster, which is started here unless ray_address is set")
    ray_address: str = _setting("", "a Ray cluster that runs already: auto, or HOST:PORT of its head")
    replicas: int = _setting(1, "with ray: servers of the same models, each with engines of its own")
    max_replicas: int = _setting(0, "with ray: replicas that load may make of them (0: no more than replicas)")
    target_queue: float = _setting(16.0, "with ray: requests a replica, under way and waiting, that scaling aims at")
    target_first_token: float = _setting(0.0, "with ray: seconds to the first token above which one is added (0: any)")
    log_level: str = _setting("info", "debug, info, warning or error")
    engine: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), metadata={"help": ""})
    engines: tuple[Base, ...] = field(default=(), metadata={"help": ""})

    @property
    def open(self) -> bool:
        """Nobody was given a key, so everybody on this machine may do everything."""
        return not (self.api_keys or self.admin_keys)

    @property
    def bases(self) -> tuple[Base, ...]:
        """Every base model, the one that answers requests without a model first."""
        return (Base(self.name, self.model, self.engine), *self.engines)

    @property
    def registry_url(self) -> str:
        return self.registry or f"sqlite:///{self.data_dir / 'registry.sqlite'}"


SETTINGS = {f.name: f for f in fields(Config) if f.name not in ("engine", "engines")}


def load(arguments: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """The Config that a command line and an environment ask for; ConfigError names what is wrong in one sentence."""
    flags = dict(_flags(list(arguments)))
    file = flags.pop("config", None) or environ.get(PREFIX + "CONFIG")
    given: dict[str, Any] = {}
    for source in (_from_file(file) if file else {}, _from_environ(environ), flags):
        given.update(source)
    return _checked(Config(**_split(given)))


def keys_hashed(keys: Iterable[str]) -> tuple[str, ...]:
    """API keys as the sha256 hex digests that are kept; `sha256:HEX` passes as it is."""
    out = []
    for key in keys:
        if not key.startswith("sha256:"):
            out.append(hashlib.sha256(key.encode()).hexdigest())
        elif re.fullmatch(r"sha256:[0-9a-f]{64}", key):
            out.append(key[7:])
        else:
            raise ConfigError("a key that begins with sha256: needs 64 lower-case hex digits behind it")
    return tuple(out)


@cache
def engine_options() -> Mapping[str, str]:
    """vLLM's option names and their annotations, read as text: importing vLLM takes eight seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(spec.submodule_search_locations[0])
    found: dict[str, str] = {}
    for file in (root / "engine/arg_utils.py", root / "entrypoints/launchers/cli_args.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("EngineArgs", "FrontendArgs")):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        found[item.target.id] = ast.unparse(item.annotation)
    return MappingProxyType({name: kind for name, kind in found.items() if not name.startswith("_")})


def _known() -> set[str]:
    return {"config", *SETTINGS, *engine_options()} - set(OURS)


def _name(raw: str, where: str) -> str:
    """A setting's name from how it was written in `where`; an unknown one is an error that names the nearest."""
    name = raw.replace("-", "_").lower()
    if name in OURS:
        raise ConfigError(f"{where} {_spelled(name, where)} is not taken: {OURS[name]}")
    if name not in _known():
        near = difflib.get_close_matches(name, _known(), n=1, cutoff=0.5)
        hint = f"; did you mean {_spelled(near[0], where)}?" if near else ""
        raise ConfigError(f"{where} {_spelled(name, where)} is not known{hint} (`loradock serve --help` lists them)")
    return name


def _spelled(name: str, where: str) -> str:
    if where == "the flag":
        return "--" + name.replace("_", "-")
    return PREFIX + name.upper() if where == "the variable" else name


def _is_bool(name: str) -> bool:
    kind = engine_options().get(name, "") if name not in SETTINGS else SETTINGS[name].type
    return str(kind).split(" |")[0] == "bool"


def _flags(arguments: list[str]) -> Iterator[tuple[str, Any]]:
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
        if bare.startswith("no_") and bare not in _known() and _is_bool(bare[3:]):
            yield bare[3:], "false"
        elif equals:
            yield _name(raw, "the flag"), value
        elif _is_bool(name := _name(raw, "the flag")):
            yield name, "true"
        elif not arguments or arguments[0].startswith("--"):
            raise ConfigError(f"the flag --{raw} needs a value")
        else:
            yield name, arguments.pop(0)


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """LORADOCK_*; a few of those names belong to the client commands."""
    client = {"CONFIG", "URL", "KEY"}
    names = {key: key[len(PREFIX) :] for key in environ if key.startswith(PREFIX)}
    return {_name(name, "the variable"): environ[key] for key, name in names.items() if name not in client}


def _from_file(file: str) -> dict[str, Any]:
    try:
        read = yaml.safe_load(Path(file).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"the config file {file} must hold `setting: value` lines")
    more = [_base(entry, file) for entry in _entries(read.pop("engines", None) or [], file)]
    flat = {**read, **_section(read.pop("engine", None) or {}, file)}
    given = {_name(str(key), "the key"): value for key, value in flat.items() if key != "engine"}
    return {**given, "engines": tuple(more)} if more else given


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
    options = {_name(str(key), "the key"): value for key, value in _section(entry.get("engine") or {}, file).items()}
    if ours := sorted(set(options) & set(SETTINGS)):
        raise ConfigError(f"{ours[0]!r} is the whole server's setting, not an engine's: move it to the top of {file}")
    model = entry["model"]
    return Base(str(entry.get("name") or Path(model.rstrip("/")).name), model, MappingProxyType(options))


def _section(section: Any, file: str) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise ConfigError(f"`engine:` in {file} must hold `option: value` lines")
    return section


def _split(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings converted to their types; the rest is the engine's, as it came."""
    ours = {name: _convert(name, value) for name, value in given.items() if name in SETTINGS}
    rest = {name: value for name, value in given.items() if name not in SETTINGS and name not in ("config", "engines")}
    return {**ours, "engine": MappingProxyType(rest), "engines": given.get("engines", ())}


def _convert(name: str, value: Any) -> Any:
    kind = str(SETTINGS[name].type)
    try:
        if name in ("slos", "policies"):
            parse = parse_slos if name == "slos" else parse_policies
            return parse(yaml.safe_load(value) if isinstance(value, str) else value)
        if kind == "Path":
            return Path(str(value)).expanduser().resolve()
        if kind.startswith("tuple"):
            items = value.split(",") if isinstance(value, str) else value
            return tuple(str(item).strip() for item in items if str(item).strip())
        if kind == "int":
            return _integer(value)
        if kind == "float":
            return float(value)
        if kind == "bool":
            return _SWITCH[str(value).lower()]
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{name} takes {_kinds(kind)}, not {value!r}") from error
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"{name} takes text, not {value!r}")
    return str(value)


def size(text: str) -> int:
    """Bytes, as 512MiB or in digits."""
    try:
        return _integer(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a size: give bytes, or as 512MiB or 4GiB") from error


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(value)
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([kmgt]i?|)b?\s*", str(value).lower())
    if not match:
        raise ValueError(value)
    return int(match[1]) * SIZES[match[2]]


def _kinds(kind: str) -> str:
    return {"int": "a whole number", "float": "a number", "Path": "a path", "bool": "true or false"}.get(kind, "a list")


def _checked(config: Config) -> Config:
    """The same Config with keys hashed and a name; what cannot be served is said here."""
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"port takes 0 to 65535, not {config.port}")
    for name in (
        "grace_period",
        "max_wait",
        "client_timeout",
        "hang_timeout",
        "restart_wait",
        "restart_window",
        "drain_timeout",
    ):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"{name} takes seconds from 0 up, not {getattr(config, name)}")
    if not 0 <= config.drift_logprobs <= 1:
        raise ConfigError(f"drift_logprobs takes a share from 0 to 1, not {config.drift_logprobs}")
    if not config.drift_threshold > 1 or config.drift_reference < 20 or config.drift_versions < 1:
        raise ConfigError("drift_threshold takes more than 1, drift_reference 20 or more, drift_versions 1 or more")
    if config.replicas < 1 or config.target_queue <= 0 or config.target_first_token < 0:
        raise ConfigError("replicas takes 1 or more, target_queue more than 0, target_first_token seconds from 0 up")
    if not config.ray and (config.replicas > 1 or config.max_replicas > 1):
        raise ConfigError("replicas are Ray's to run: add --ray, or start one server for each machine yourself")
    for pattern in config.capture_redact:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"capture_redact takes regular expressions, not {pattern!r}: {error}") from error
    for digest in config.allowed_digests:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ConfigError(f"allowed_digests takes 64 lower-case hex digits each, not {digest!r}")
    for name in ("probe_min_effect", "probe_max_perplexity", "swap_tolerance"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"{name} takes a number from 0 up, not {getattr(config, name)}")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"log_level takes debug, info, warning or error, not {config.log_level!r}")
    if config.lora_kernels not in ("auto", "layers", "compile", "off"):
        raise ConfigError(f"lora_kernels takes auto, layers, compile or off, not {config.lora_kernels!r}")
    if config.cpu_weights not in ("auto", "int8"):
        raise ConfigError(f"cpu_weights takes auto or int8, not {config.cpu_weights!r}")
    if config.cpu_weights == "int8" and config.lora_kernels != "auto":
        raise ConfigError("cpu_weights=int8 goes with lora_kernels=auto alone: only its kernels read such weights")
    if bool(config.ssl_certfile) != bool(config.ssl_keyfile):
        raise ConfigError("ssl_certfile and ssl_keyfile go together: give both or none")
    if config.open and not _loopback(config.host):
        raise ConfigError(
            f"{config.host} is reachable from other machines and no key is set: "
            "set LORADOCK_ADMIN_KEYS (and LORADOCK_API_KEYS), or listen on 127.0.0.1"
        )
    name = config.name or Path(config.model.rstrip("/")).name
    names = [name, *(base.name for base in config.engines)]
    for one in names:
        if "@" in one or not one:
            raise ConfigError(f"the base model's name {one!r} must not be empty nor hold @: set --name")
        if names.count(one) > 1:
            raise ConfigError(f"two engines are called {one!r}: give each a `name:` of its own")
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values |= {"name": name, "api_keys": keys_hashed(config.api_keys), "admin_keys": keys_hashed(config.admin_keys)}
    return Config(**values)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_help() -> str:
    """Every setting of ours on a line, for `--help`."""
    rows = []
    for name, item in SETTINGS.items():
        shown = "" if item.default is MISSING or item.default in ("", ()) else f" [{item.default}]"
        rows.append(f"--{name.replace('_', '-'):<24} {item.metadata['help']}{shown}")
    return "\n".join(rows)
