"""Processes say what they are, and their warnings reach the server."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import setproctitle

from serve.vllm_backend import announce
from serve.vllm_backend.notices import Notices
from serve.vllm_backend.patches import titles

PROGRAM = """
import os, sys, types
import setproctitle
from serve.vllm_backend.patches import titles

vllm = sys.modules["vllm.executor"] = types.ModuleType("vllm.executor")
vllm.set_process_title = lambda name, suffix="": setproctitle.setproctitle(f"loradock::{name}")
vllm.set_process_title(sys.argv[1])
titles.install()
if len(sys.argv) > 2:
    vllm.set_process_title(*sys.argv[2:])
print(open(f"/proc/{os.getpid()}/cmdline").read().rstrip("\\0"))
"""


@pytest.mark.parametrize(
    ("named", "title"),
    [
        (["EngineCore"], "loradock: engine smollm2"),
        (["EngineCore_DP1"], "loradock: engine smollm2 DP1"),
        (["EngineCore", "Worker"], "loradock: worker smollm2"),
        (["EngineCore", "Worker_PP0_TP1"], "loradock: worker smollm2 PP0 TP1"),
        (["EngineCore", "DPCoordinator"], "loradock: coordinator smollm2"),
    ],
)
def test_a_process_of_vllm_s_is_named_after_its_engine(named, title):
    environ = {**os.environ, titles.ENGINE: "smollm2"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *named], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == title, done.stderr


def test_vllm_names_its_processes_where_titles_take_over():
    from vllm.v1.engine import coordinator, core
    from vllm.v1.executor import multiproc_executor

    for module in (core, coordinator, multiproc_executor):
        assert callable(module.set_process_title)
    assert setproctitle.__version__


def test_each_warning_of_a_process_is_kept_once_and_what_is_no_warning_is_not():
    kept = Notices()
    logger = logging.Logger("serve.cpu_kernels")
    logger.addHandler(kept)
    for _ in range(3):
        logger.warning("no C++ compiler: install %s", "g++")
        logger.info("loaded")
    assert kept.messages == ["no C++ compiler: install g++"]


def test_what_two_workers_warn_of_is_told_once_with_the_size_of_the_cache(caplog):
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_size_tokens=186_368), model_config=SimpleNamespace(max_model_len=8192)
    )
    with caplog.at_level("INFO", "serve"):
        announce.loaded("smollm2", config, 8, ["no compiler", "no compiler"])
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "smollm2: KV cache for 186,368 tokens (22.8 requests of 8,192), 8 adapters in a batch",
        "smollm2: no compiler",
    ]
