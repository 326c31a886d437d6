"""An engine on a GPU starts where CUDA's compiler is not installed, and whoever starts it is told what it lacks."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from pathlib import Path

import pytest

from serve.config import Base
from serve.models.cuda_toolkit import Toolkit, environment, notice
from serve.server import gpu_defaults

ROOT = Path(__file__).parents[3]
OFF = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}


def program(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def toolkit(tmp_path):
    """Of an environment whose `bin` has ninja and is on no PATH, as `make serve` starts a server; no nvcc anywhere."""
    own = program(tmp_path / "env/bin", "ninja")
    (tmp_path / "empty").mkdir()

    def made(**environ: str) -> Toolkit:
        return Toolkit({"PATH": str(tmp_path / "empty"), **environ}, tmp_path / "cuda", tmp_path / "include", own)

    return made


def test_without_a_compiler_vllm_does_without_what_compiles(toolkit, tmp_path):
    path = f"{tmp_path / 'env/bin'}:{tmp_path / 'empty'}"
    assert environment(toolkit()) == {"PATH": path, **OFF}
    said = notice(toolkit())
    assert said.startswith("nvcc not found") and "VLLM_USE_FLASHINFER_SAMPLER=0" in said and "CUDA_HOME" in said


def test_what_somebody_has_set_stays(toolkit):
    own = toolkit(VLLM_USE_FLASHINFER_SAMPLER="1", VLLM_USE_DEEP_GEMM="1")
    assert environment(own).keys() == {"PATH"} and notice(own) == ""


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "/usr/local/cuda"])
def test_nvcc_is_found_where_flashinfer_looks(toolkit, tmp_path, place):
    home = tmp_path / ("cuda" if place == "/usr/local/cuda" else "toolkit")
    program(home / "bin", "nvcc")
    more = {"CUDA_HOME": str(home)} | {"CUDA_PATH": str(home)} if place.startswith("CUDA") else {}
    environ = {name: value for name, value in more.items() if name == place}
    found = toolkit(**environ) if place != "PATH" else toolkit(PATH=str(home / "bin"))
    assert found.nvcc == str(home / "bin/nvcc") and found.missing == ()
    assert environment(found).keys() == {"PATH"} and notice(found) == ""


def test_a_named_home_without_nvcc_is_not_made_up_for_by_the_path(toolkit, tmp_path):
    program(tmp_path / "elsewhere", "nvcc")
    named = toolkit(CUDA_HOME=str(tmp_path / "nothing"), PATH=str(tmp_path / "elsewhere"))
    assert named.missing == ("nvcc",)


def test_without_ninja_flashinfer_alone_is_done_without(toolkit, tmp_path):
    program(tmp_path / "cuda/bin", "nvcc")
    (tmp_path / "env/bin/ninja").unlink()
    assert environment(toolkit()).keys() == {"PATH", "VLLM_USE_FLASHINFER_SAMPLER"}


def test_a_server_says_so_once_and_of_blocks_of_fp8_what_it_costs(toolkit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "model").mkdir()
    groups = {"group_0": {"weights": {"strategy": "block", "num_bits": 8}}}
    text = json.dumps({"quantization_config": {"config_groups": groups}})
    (tmp_path / "model/config.json").write_text(text)
    with caplog.at_level(logging.WARNING, "loradock"):
        gpu_defaults.set_environment([Base("m", str(tmp_path / "model"))], toolkit())
    (line,) = caplog.messages
    assert "DeepGEMM" in line
    assert os.environ.items() >= {**OFF, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}.items()


def test_pythons_headers_are_looked_for(toolkit, tmp_path):
    assert not toolkit().has_python_headers
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    assert toolkit().has_python_headers


def test_the_image_has_what_a_start_needs():
    """A compiler for Triton, Python's headers (python:*-slim has them), and its own programs on PATH."""
    image = (ROOT / "docker/Dockerfile.gpu").read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.1[1-3][\d.]*-slim", image, re.MULTILINE)
    final = image.split("FROM ${PYTHON_IMAGE}")[-1]
    assert "install -y --no-install-recommends g++" in final
    assert "ENV PATH=/opt/loradock/bin:$PATH" in final


def test_make_serve_starts_a_program_whose_neighbours_are_found(tmp_path):
    """By its path, so PATH has not its folder: ninja of the environment is found all the same."""
    told = subprocess.run(["make", "-n", "serve"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"exec \.venv/bin/loradock serve", told)
    program(tmp_path / ".venv/bin", "ninja")
    assert Toolkit({"PATH": ""}, bin=tmp_path / ".venv/bin").ninja == str(tmp_path / ".venv/bin/ninja")
