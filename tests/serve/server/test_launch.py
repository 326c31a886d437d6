"""`loradock serve` that cannot serve says so in one sentence, quickly, and exits non-zero."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading

import pytest

from serve.errors import ConfigError
from serve.models import engine_memory, hardware
from serve.models.host import Host
from serve.server.launch import _told_briefly

SAYS_CORES = "import os; print(*os.sched_getaffinity(0))"
# How many cores each thread has once one of two leaves one, and once the whole process does.
LEAVES = """
import os, threading
from serve.models import hardware

waiting = threading.Event()
threading.Thread(target=waiting.wait).start()
for whole in (False, True):
    hardware.leave_core(whole)
    print(*(len(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")))
waiting.set()
"""


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LORADOCK_")}
    command = [sys.executable, "-m", "serve.cli", *arguments]
    return subprocess.run(command, env=kept | environ, capture_output=True, text=True, timeout=120)


def assert_refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr + done.stdout
    for words in says:
        assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.fixture
def data(tmp_path):
    return f"--data-dir={tmp_path / 'data'}"


def test_a_wrong_flag_names_the_nearest(data):
    assert_refused(run("serve", data, "--max-lorass", "3"), "--max-lorass", "--max-loras")


def test_a_missing_model(data):
    assert_refused(run("serve", "./nowhere", data, "--port", "0"), "./nowhere", "checkpoint directory")


def test_a_folder_that_is_no_model(tmp_path, data):
    assert_refused(run("serve", str(tmp_path), data, "--port", "0"), "config.json")


def test_an_adapter_is_not_a_model(make_adapter, data):
    assert_refused(run("serve", str(make_adapter()), data, "--port", "0"), "LoRA adapter", "loradock adapters push")


def test_a_port_in_use(tiny_model, data):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(run("serve", str(tiny_model), data, "--port", str(port)), str(port), "--port")


def test_too_little_memory(tiny_model, data):
    if not hardware.on_cpu():
        pytest.skip("the engine's memory is the GPU's")
    done = run("serve", str(tiny_model), data, "--port", "0", "--kv-cache-memory-bytes", "9000G")
    assert_refused(done, "9000.0 GiB of KV cache", "lower kv_cache_memory_bytes")


def test_engines_have_to_fit_beside_one_another(tiny_model, tmp_path, monkeypatch):
    from serve.config import load
    from serve.server.launch import resolved

    gib = hardware.GIB
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setattr(engine_memory, "weights", lambda *_: 3 * gib)
    monkeypatch.setattr(engine_memory, "slots", lambda *_: 0)
    file = tmp_path / "loradock.yaml"
    file.write_text(f"engines:\n  - {{name: other, model: {tiny_model}}}\n")
    config = load([str(tiny_model), "--config", str(file)], {})
    monkeypatch.setattr(Host, "free_memory", lambda self: 20 * gib)
    made = resolved(config)
    assert [engine["kv_cache_memory_bytes"] / gib for engine in (made.engine, made.engines[0].engine)] == [4, 2.25]
    monkeypatch.setattr(Host, "free_memory", lambda self: 8 * gib)  # for one there is room
    with pytest.raises(ConfigError, match="do not fit beside 4.0 GiB for the engines before it in the 8.0 GiB"):
        resolved(config)


def test_compiled_code_is_kept_in_the_cache_folder_on_every_machine(tiny_model, tmp_path, monkeypatch):
    from serve.config import load
    from serve.server.launch import resolved

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    resolved(load([str(tiny_model), "--cache-dir", str(tmp_path)], {}))
    assert os.environ["LORADOCK_CACHE_DIR"] == str(tmp_path)


@pytest.mark.parametrize(
    ("on_cpu", "given", "taken"), [(False, "", "spawn"), (False, "fork", "fork"), (True, "", None)]
)
def test_where_a_gpu_computes_no_engine_is_forked_from_a_server_with_threads(
    on_cpu, given, taken, tiny_model, tmp_path, monkeypatch
):
    from serve.config import load
    from serve.server.launch import resolved

    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    if given:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = given
    monkeypatch.setattr(hardware, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(Host, "free_memory", lambda self: 20 * hardware.GIB)
    resolved(load([str(tiny_model), "--cache-dir", str(tmp_path)], {}))
    assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == taken


def test_a_public_address_without_keys(tiny_model, data):
    assert_refused(run("serve", str(tiny_model), data, "--host", "0.0.0.0"), "0.0.0.0", "LORADOCK_ADMIN_KEYS")


def test_a_data_directory_that_another_server_uses(tiny_model, tmp_path, data):
    from serve.server.launch import own

    with own(tmp_path / "data"):
        assert_refused(run("serve", str(tiny_model), data, "--port", "0"), "another loradock")


def test_a_data_directory_on_a_full_disk_is_refused_before_an_engine_starts(tmp_path):
    from serve.server.launch import own

    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left on device.*make room"), own(tmp_path):
        pass


def test_an_existing_data_directory_is_closed_to_other_accounts(tmp_path, caplog):
    from serve.server.launch import own

    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    for _ in range(2):
        with own(folder):
            assert folder.stat().st_mode & 0o777 == 0o700
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} could be read by other accounts (mode 0755): it is 0700 now"
    ]


@pytest.mark.parametrize("option", ["max_loras", "tensor_parallel_size"])
def test_an_engine_option_that_is_no_number_is_a_sentence(tiny_model, data, option):
    said = run("serve", str(tiny_model), data, "--port", "0", f"--{option.replace('_', '-')}", "x")
    assert_refused(said, f"{option} takes a whole number above 0, not 'x'")


def test_a_data_directory_that_cannot_be(tiny_model):
    assert_refused(run("serve", str(tiny_model), "--data-dir=/proc/nowhere", "--port", "0"), "--data-dir")


def test_help_is_quick_and_loads_no_engine():
    code = "import sys; sys.argv=['loradock','serve','--help']\n"
    code += "try:\n from serve.cli.main import main; main()\nfinally: "
    code += "assert not {'torch','vllm','transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Examples" in done.stdout


def test_before_a_server_is_forked_nothing_is_imported_that_starts_a_thread():
    """numpy does, on more than one core: then engines are not forked, and what both import is in memory twice."""
    look = "import os, sys; print(len(os.listdir('/proc/self/task')), 'numpy' in sys.modules, 'torch' in sys.modules)"
    program = f"import serve.cli.main, serve.server.launch, serve.models.embedded; {look}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "False", "False"], done.stderr


def test_the_cores_and_libraries_that_somebody_chose_are_left_alone():
    given = {"VLLM_CPU_OMP_THREADS_BIND": "0", "LD_PRELOAD": "/x/libgomp.so:/x/libjemalloc.so"}
    assert not hardware.one_process(given, workers=1)
    assert hardware.cpu_environment(given, together=False) == {"LD_PRELOAD": given["LD_PRELOAD"]}
    given = {"OMP_NUM_THREADS": "1", "KMP_AFFINITY": "none", "KMP_BLOCKTIME": "0", "KMP_TPAUSE": "1"}
    assert not given.keys() & hardware.cpu_environment(given, together=True).keys()


def test_on_a_small_machine_every_core_computes_in_the_engine_process(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 0})
    assert hardware.one_process({}, workers=1)
    assert not hardware.one_process({}, workers=2)
    assert "proclist=[0,1]" in hardware.cpu_environment({}, together=True)["KMP_AFFINITY"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert not hardware.one_process({}, workers=1)


def in_a_thread(look):
    """What it says there: a thread has its cores for itself."""
    found = []
    thread = threading.Thread(target=lambda: found.append(look()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(len(hardware.CORES) < 2, reason="one core")
def test_a_server_leaves_the_core_on_which_its_engines_schedule(monkeypatch):
    first, *others = sorted(hardware.CORES)

    def left(affinity):
        monkeypatch.setenv("KMP_AFFINITY", affinity)
        hardware.leave_core()
        before = os.sched_getaffinity(0)
        with hardware.every_core():
            started = subprocess.run([sys.executable, "-c", SAYS_CORES], capture_output=True, text=True, check=True)
        assert os.sched_getaffinity(0) == before
        return before, {int(core) for core in started.stdout.split()}

    dealt = hardware.cpu_environment({}, together=True)["KMP_AFFINITY"]
    assert in_a_thread(lambda: left(dealt)) == (set(others), hardware.CORES)
    assert in_a_thread(lambda: left("none")) == (hardware.CORES, hardware.CORES)
    monkeypatch.setattr(hardware, "CORES", frozenset({first}))
    monkeypatch.setenv("KMP_AFFINITY", hardware.cpu_environment({}, together=True)["KMP_AFFINITY"])
    assert in_a_thread(lambda: hardware.leave_core() or os.sched_getaffinity(0)) == {first, *others}


@pytest.mark.skipif(len(hardware.CORES) < 2, reason="one core")
def test_threads_that_were_there_before_leave_it_too():
    dealt = hardware.cpu_environment({}, together=True)
    done = subprocess.run([sys.executable, "-c", LEAVES], env={**os.environ, **dealt}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, both = (line.split() for line in done.stdout.splitlines())
    every, others = str(len(hardware.CORES)), str(len(hardware.CORES) - 1)
    assert sorted(alone) == sorted([others, every]) and both == [others, others]


def test_memory_that_does_not_suffice_is_a_sentence():
    with pytest.raises(ConfigError, match="do not fit"):
        hardware.check_memory(1 << 50, 0)


def test_an_answer_that_outlasts_the_grace_period_is_a_line_and_no_traceback(caplog, monkeypatch):
    logger = logging.getLogger("uvicorn.error")
    # A server that ran in this process has set up logging its way: its parent, "uvicorn", hands nothing on.
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.ERROR, logger.name)
    logger.addFilter(_told_briefly)
    try:
        for error in (asyncio.CancelledError("timeout"), RuntimeError("a real one")):
            logger.error("Exception in ASGI application\n", exc_info=error)
    finally:
        logger.removeFilter(_told_briefly)
    cut, broken = caplog.records
    assert cut.exc_info is None and "the grace period is over" in cut.getMessage()
    assert broken.exc_info and "a real one" in caplog.text
