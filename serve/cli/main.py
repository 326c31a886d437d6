"""The `loradock` command. Nothing here imports torch or vLLM before it must: `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli import installation, operate, plan
from serve.cli.adapters import adapters_app
from serve.cli.arguments import Commands
from serve.cli.baseline import baseline_app
from serve.cli.bench import bench_app
from serve.cli.data import data_app
from serve.cli.demo import command as demo
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

# How help groups the commands, in the order in which a reader needs them.
ORDER = (
    *("serve", "demo", "doctor", "plan", "version", "adapters"),
    *("drift", "golden", "baseline", "usage", "monitoring"),
    *("finetune", "data", "loop", "optimize"),
    *("engines", "keys", "batch", "bench", "backup", "restore", "requirements"),
)
START = "Start"
ADAPTERS = "Adapters"
WATCH = "Watch"
TRAIN = "Train"
OPERATE = "Operate"


class _InOrder(Commands):
    """The commands as ORDER has them, whatever is a group."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="loradock",
    help="Serve a language model with many LoRA adapters, watch them, and change them while requests run.",
    no_args_is_help=True,
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _register() -> None:
    """Every command but `serve` and `optimize`, in the order of the help."""
    plan.register(app, START)
    demo.register(app, START)
    installation.register(app, START, OPERATE)
    app.add_typer(adapters_app, name="adapters", rich_help_panel=ADAPTERS)
    app.add_typer(bench_app, name="bench", rich_help_panel=OPERATE)
    for group in (drift_app, golden_app, baseline_app, monitoring_app):
        app.add_typer(group, rich_help_panel=WATCH)
    usage_example = example("loradock usage --month 2026-11", "loradock usage --tenant acme --csv > acme.csv")
    app.command(epilog=usage_example, rich_help_panel=WATCH)(usage)
    for group in (finetune_app, data_app, loop_app):
        app.add_typer(group, rich_help_panel=TRAIN)
    for group in (engines_app, keys_app):
        app.add_typer(group, rich_help_panel=OPERATE)
    operate.register(app, OPERATE)


SERVE_HELP = """Serve MODEL with LoRA adapters behind OpenAI's API.

MODEL is a local directory, a GGUF file, a hub id, an export of `loradock optimize`, or smollm2 (the default, 135M).

Every setting is a flag, a LORADOCK_* variable, and a line in the file that --config names; the flag wins. Every option
of vLLM's engine and OpenAI server is a setting too, under vLLM's name: --max-model-len 4096, --max-loras 16,
--quantization ..., --enforce-eager, --no-enable-prefix-caching.

\b
Examples:
  loradock serve
  loradock serve ./my-model --port 9000 --max-lora-rank 64
  LORADOCK_ADMIN_KEYS=secret loradock serve org/name --host 0.0.0.0

The settings that are used most are below; --help-all shows every one.

"""


def _every_setting(wanted: bool) -> None:
    if wanted:
        typer.echo(settings_help(every=True).replace("\b\n", ""))
        raise typer.Exit


@app.command(
    rich_help_panel=START,
    help=SERVE_HELP + settings_help(),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[MODEL] [--config loradock.yaml] [--SETTING VALUE ...]",
)
def serve(
    context: typer.Context,
    help_all: Annotated[
        bool, typer.Option("--help-all", is_eager=True, callback=_every_setting, help="Show every setting, and exit.")
    ] = False,
) -> None:
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
    rich_help_panel=TRAIN,
    help="Make a model smaller: merge, prune, quantize, export.",
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


_register()


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
