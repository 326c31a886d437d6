"""From a Config to a listening server: checks that cost nothing first, vLLM's import and the engine last."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import signal
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from socket import socket
from types import MappingProxyType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from serve.config import ADAPTERS, Base, Config, kv_cache, whole
from serve.cpu_kernels.build import keeps_gguf
from serve.errors import ConfigError, LoradockError
from serve.models import engine_memory, gpus, hardware
from serve.models.checkpoint import EMBEDDED, find, verify_weights
from serve.server import gpu_defaults
from serve.server.connection import KEEP_ALIVE, guarded, raise_descriptor_limit
from serve.server.front_ends import FrontEnds, how_many
from serve.server.garbage import collect_in_quiet
from serve.server.logs import Log, log_to_stderr
from serve.server.temporary_folder import temporary_folder
from serve.vllm_backend import forkserver
from serve.vllm_backend.patches import switches, titles

log = logging.getLogger("loradock")

# By its path: by its short name, `uni`, vLLM takes it for a mistake on a CPU.
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
# On a full disk an engine ends while it starts, and its log cannot say why.
LEAST_ROOM = 64 << 10


def serve(config: Config) -> int:
    """Serve until a signal; the exit code. Raises ConfigError for what cannot be served."""
    log_to_stderr(config.log_level)
    if not hardware.on_cpu():
        gpus.check_present()
    sock = hardware.listen(config.host, config.port)
    try:
        config = resolved(config)
        with (
            own(config.data_dir),
            temporary_folder(config.data_dir),
            Log(config.data_dir / "log", config.log_level) as output,
        ):
            try:
                return _run(config, sock, output)
            except LoradockError:
                output.show_errors()
                raise
    finally:
        sock.close()


def resolved(config: Config) -> Config:
    """The same Config with every base's model found, and the engine options that this server prefers to vLLM's."""
    environ = dict(os.environ)
    os.environ["LORADOCK_CACHE_DIR"] = str(config.cache_dir)  # where compiled code is kept, the watcher's too
    bases = [replace(base, model=_found(config, base)) for base in config.bases]
    if not hardware.on_cpu():
        gpu_defaults.set_environment(bases)
        bases = gpu_defaults.with_room(bases)
    made, before = list[Base](), 0
    for base in bases:
        with_defaults, taken = _with_defaults(config, base, environ, before)
        made.append(with_defaults)
        before += taken
    os.environ[switches.VARIABLE] = switches.written(config.vllm_patches)  # vLLM's own processes know no Config
    first, *more = made
    return replace(config, model=first.model, engine=first.engine, engines=tuple(more))


def _found(config: Config, base: Base) -> str:
    kept = keeps_gguf(config.lora_kernels, config.cpu_weights, base.engine)
    model = find(base.model, config.cache_dir, keeps_gguf=kept)
    verify_weights(model, config.cache_dir)
    return model


def _with_defaults(config: Config, base: Base, environ: Mapping[str, str], before: int) -> tuple[Base, int]:
    """The base, and bytes of a CPU's memory that its engine will take. before: what the engines before it take."""
    engine, taken = dict[str, Any](ADAPTERS), 0
    # Among equals it serves who came first, as vLLM's default does; probes and shadows wait behind clients.
    engine["scheduling_policy"] = "priority"
    if base.name == EMBEDDED:
        # Arguments follow their schema, as if every tool were strict: a model this small leaves fields out.
        engine |= {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "tool_strict_level": "parameter"}
    engine |= base.engine
    if "max_cpu_loras" not in base.engine:
        engine["max_cpu_loras"] = max(engine["max_cpu_loras"], whole(engine, "max_loras"))
    if config.speculation != "off" and not hardware.on_cpu():
        raise ConfigError(
            f"speculation={config.speculation} is for engines on a CPU: here give vLLM's own speculative_config"
        )
    if hardware.on_cpu():
        ranks = whole(engine, "data_parallel_size")
        fused = hardware.fused_step(config.lora_kernels)
        weights = ranks * engine_memory.weights(Path(base.model), config.cpu_weights, fused)
        slots = ranks * engine_memory.slots(
            Path(base.model), whole(engine, "max_loras"), whole(engine, "max_lora_rank")
        )
        if "gpu_memory_utilization" not in engine:
            engine.setdefault("kv_cache_memory_bytes", hardware.kv_space(before + weights + slots) // ranks)
            hardware.check_memory(weights, kv_cache(engine), slots=slots, before=before)
        taken = weights + slots + kv_cache(engine)
        workers = whole(engine, "tensor_parallel_size") * whole(engine, "pipeline_parallel_size")
        together = "distributed_executor_backend" not in engine and hardware.one_process(environ, workers)
        if together:
            engine["distributed_executor_backend"] = IN_PROCESS
            # More at once answer no more in all, and each of them slower: the rest waits in line, where it is fair.
            engine.setdefault("max_num_seqs", 32)
        os.environ.update(hardware.cpu_environment(environ, together))
        # Read in vLLM's own processes, which know no Config.
        os.environ["LORADOCK_LORA_KERNELS"] = config.lora_kernels
        os.environ["LORADOCK_CPU_WEIGHTS"] = config.cpu_weights
        os.environ["LORADOCK_SPECULATION"] = config.speculation
        os.environ["LORADOCK_TARGET_INTER_TOKEN"] = config.target_inter_token
        # torch.compile's default is below /tmp, which many machines empty: the first start after that is a slow one.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.cache_dir / "compiled"))
    return replace(base, engine=MappingProxyType(engine)), taken


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """The data directory, made when absent, and ours alone: a second server would sweep away this one's uploads."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _tighten(folder)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"the data directory {folder} cannot be used ({error.strerror}): set --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another loradock serves from {folder}: stop it, or set another --data-dir") from error
        try:
            lock.write(" " * LEAST_ROOM)
            lock.flush()
            lock.truncate(0)
        except OSError as error:
            raise ConfigError(
                f"the data directory {folder} cannot be written ({error.strerror}): make room, or set --data-dir"
            ) from error
        yield


def _tighten(folder: Path) -> None:
    """Prompts, keys' digests and tenants' adapters lie there: other accounts of this machine may not read them."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        folder.chmod(0o700)
        log.warning("%s could be read by other accounts (mode %04o): it is 0700 now", folder, mode)


def _run(config: Config, sock: socket, output: Log) -> int:
    log.info("loading vLLM; everything that it says is in %s", output.path)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault(titles.PREFIX, "loradock")
    raise_descriptor_limit()
    # What is imported stays; to look for garbage in it again and again takes a third of the time.
    gc.disable()
    if hardware.on_cpu() and not switches.parse(config.vllm_patches).forks:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a process with threads is not forked
    elif hardware.on_cpu():
        forkserver.start(((base.model, base.engine) for base in config.bases), _import_server)
        if forkserver.wanted():
            hardware.leave_core(whole_process=True)
    output.watch()
    from serve.server.assembly import build_app
    from serve.vllm_backend.backend import VLLMBackend

    gc.freeze()
    gc.enable()

    failures: list[LoradockError] = []

    def fail(error: LoradockError) -> None:
        failures.append(error)
        server.should_exit = True

    backends = [VLLMBackend(base.model, base.name, base.engine, config.coalesce_ms) for base in config.bases]
    app = build_app(config, backends, fail)
    front_ends = FrontEnds(how_many(config.front_ends, secure=bool(config.ssl_certfile)) - 1)
    app.state.parts.metrics.watch(front_ends)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(config.grace_period)),
            timeout_keep_alive=KEEP_ALIVE,
            http=guarded(config.client_timeout, front_ends=front_ends),
            ssl_certfile=config.ssl_certfile or None,
            ssl_keyfile=config.ssl_keyfile or None,
        )
    )
    logging.getLogger("uvicorn.error").addFilter(_told_briefly)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(server, app, sock, config, front_ends))
    for error in failures:
        raise error
    return 0


def _import_server() -> None:
    """What the server needs beside vLLM, and its engines do not."""
    import serve.server.assembly  # noqa: F401
    from serve.cpu_kernels import pages
    from serve.vllm_backend.backend import prepare

    prepare()
    pages.release()


def _told_briefly(record: logging.LogRecord) -> bool:
    """An answer that the end of the grace period broke off is a line and no traceback."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        record.msg = "an answer was broken off: the grace period is over"
        record.args = ()
        record.exc_info = None
    return True


async def _serve(server: Server, app: FastAPI, sock: socket, config: Config, front_ends: FrontEnds) -> None:
    loop = asyncio.get_running_loop()
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # nohup goes on
    for number in (signal.SIGTERM, signal.SIGINT, *hangup):
        loop.add_signal_handler(number, server.ask_to_stop)
    scheme = "https" if config.ssl_certfile else "http"
    host, port = sock.getsockname()[:2]
    announce = asyncio.create_task(_announce(app, f"{scheme}://{host}:{port}", server))
    try:
        async with front_ends.running():
            await server.serve(sockets=[sock])
    finally:
        announce.cancel()


async def _announce(app: FastAPI, url: str, server: Server) -> None:
    log.info("listening on %s", url)
    await app.state.parts.health.ready.wait()
    log.info("ready: %s/v1 answers as %s", url, app.state.parts.fleet.first.name)
    await collect_in_quiet(lambda: len(server.server_state.connections))


class Server(uvicorn.Server):
    """uvicorn, with a stop that ends in exit code 0: the first signal drains, the second does not wait."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def ask_to_stop(self) -> None:
        self.force_exit = self.should_exit
        log.info("stopping now" if self.force_exit else "stopping: running answers may finish")
        self.should_exit = True
