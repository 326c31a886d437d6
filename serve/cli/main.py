"""The `loradock` command. Nothing here imports torch or vLLM before it must: `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer

from serve.cli import installation, operate
from serve.cli.adapters import adapters_app
from serve.cli.baseline import baseline_app
from serve.cli.bench import bench_app
from serve.cli.data import data_app
from serve.cli.drift import drift_app
from serve.cli.engines import engines_app
from serve.cli.finetune import finetune_app
from serve.cli.golden import golden_app
from serve.cli.keys import keys_app
from serve.cli.loop import loop_app
from serve.cli.monitoring import monitoring_app
from serve.cli.terminal import example, say_error
from serve.cli.usage import usage
from serve.config import Config, load, settings_help
from serve.errors import ConfigError, LoradockError

# typer exports this one by its subclass alone.
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="loradock",
    help="Optimize language models, and serve them with many hot-swapped LoRA adapters.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.add_typer(adapters_app, name="adapters")
app.add_typer(baseline_app, name="baseline")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(drift_app, name="drift")
app.add_typer(engines_app, name="engines")
app.add_typer(finetune_app, name="finetune")
app.add_typer(golden_app, name="golden")
app.add_typer(keys_app, name="keys")
app.add_typer(loop_app, name="loop")
app.add_typer(monitoring_app, name="monitoring")

operate.register(app)
installation.register(app)
app.command(epilog=example("loradock usage --month 2026-11", "loradock usage --tenant acme --csv > acme.csv"))(usage)

SERVE_HELP = """Serve MODEL with hot-swapped LoRA adapters behind an OpenAI-compatible endpoint.

MODEL is a local directory, a hub id, an export of `loradock optimize`, or smollm2 (the default, 135M parameters).

Every setting is a flag, a LORADOCK_* variable, and a line in the file that --config names; the flag wins. Every option
of vLLM's engine and OpenAI server is a setting too, under vLLM's name: --max-model-len 4096, --max-loras 16,
--quantization ..., --enforce-eager, --no-enable-prefix-caching.

\b
Examples:
  loradock serve
  loradock serve ./my-model --port 9000 --max-lora-rank 64
  LORADOCK_ADMIN_KEYS=secret loradock serve org/name --host 0.0.0.0

\b
Settings:
"""


@app.command(
    help=SERVE_HELP + settings_help(),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[MODEL] [--config loradock.yaml] [--SETTING VALUE ...]",
)
def serve(context: typer.Context) -> None:
    config = load(context.args)
    try:
        code = _serve(config, context)
    except LoradockError as error:
        _print_error(error)
        code = 2
    # Everything is closed by now; torch's and vLLM's native modules take seconds to unload, and complain of leaks.
    sys.stderr.flush()
    os._exit(code)


def _serve(config: Config, context: typer.Context) -> int:
    if config.ray:
        from serve.server.ray_serve import serve as run_replicas

        return run_replicas(config, lambda: load(context.args))
    from serve.server.launch import serve as run

    return run(config)


def _print_error(error: LoradockError) -> None:
    say_error(error, "loradock")


@app.command(
    help="Turn a base model and its adapters into an optimized, measured export (`loradock optimize --help`).",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    options_metavar="RECIPE [OPTIONS]",
)
def optimize(context: typer.Context) -> None:
    from optimize.cli import run as run_recipe
    from serve.models import cuda_toolkit, hardware
    from serve.models.embedded import ensure

    def embedded(name: str) -> Path:
        return ensure(name, progress=lambda line: print(line, file=sys.stderr))

    def served() -> dict[str, str]:
        if hardware.on_cpu():
            return hardware.cpu_environment(os.environ, together=True)
        return cuda_toolkit.environment(cuda_toolkit.Toolkit())

    raise typer.Exit(run_recipe(context.args, embedded, served))


def main() -> None:
    """Run the command: an error of ours is a sentence and exit code 2, never a traceback."""
    words = sys.argv[1:]
    try:
        # With --json typer's own errors are left to us; else they are sentences already.
        sys.exit(app(standalone_mode="--json" not in words))
    except LoradockError as error:
        _print_error(error)
    except UsageError as wrong:
        say_error(ConfigError(wrong.format_message()), "loradock", as_json=True)
    except typer.Abort:
        sys.exit(1)
    sys.exit(2)
