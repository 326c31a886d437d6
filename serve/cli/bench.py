"""`loradock bench`: load against a running server, or two against each other.

A group and not a command, so that other proofs under load can join it as sub-commands.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import typer

from serve.cli.arguments import Commands
from serve.cli.terminal import SERVER
from serve.errors import ConfigError, LoradockError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from serve.client.bench.load import Answer, Level, Server, Settings
    from serve.client.bench.rounds import Result, Round

bench_app = typer.Typer(
    name="bench", help="Measure a running server, or two against each other.", rich_markup_mode=None, cls=Commands
)

# How help groups the options.
ASK = "What is asked"
LOAD = "Load"
RUN = "Rounds and result"
SECOND = "A second server (B)"

_EPILOG = """\b
Examples:
  loradock bench --model smollm2 --streams 1,16
  loradock bench --adapters support,legal,sql --adapter-mix zipf:1.1 --streams 16 --json run.json
  loradock bench --url http://127.0.0.1:8000 --vs http://127.0.0.1:8001 --streams 16 --rounds 7 --ignore-eos
"""


@bench_app.callback(invoke_without_command=True, epilog=_EPILOG)
def bench(  # long: typer makes an option of each parameter
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="LORADOCK_URL", help="The server to measure (A).", rich_help_panel=SERVER)
    ] = ("http://127.0.0.1:8000"),
    vs: Annotated[
        str | None,
        typer.Option(help="A second server (B): rounds alternate A B B A, ratios are paired.", rich_help_panel=SECOND),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model to ask; repeat for a mix. Default: the first that is listed.", rich_help_panel=ASK),
    ] = None,
    vs_model: Annotated[
        list[str] | None, typer.Option(help="The same on B, where its names differ.", rich_help_panel=SECOND)
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Adapters to ask instead of --model, each request one of them.", rich_help_panel=ASK
        ),
    ] = None,
    vs_adapters: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="The same on B, where its names differ.", rich_help_panel=SECOND)
    ] = None,
    adapter_mix: Annotated[
        str, typer.Option(metavar="uniform|zipf[:S]", help="How often each is asked.", rich_help_panel=ASK)
    ] = "uniform",
    streams: Annotated[
        str,
        typer.Option(
            metavar="N[,N]", help="Concurrent streams; each asks again when it is answered.", rich_help_panel=LOAD
        ),
    ] = "1,16",
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R]", help="Open loop instead: R requests/s as a Poisson process.", rich_help_panel=LOAD
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests per round. Default: 4 per stream, at least 8.", rich_help_panel=LOAD),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Seconds per round instead of --requests; those begun are finished.", rich_help_panel=LOAD
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About how long a prompt is.", rich_help_panel=ASK)] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may get.", rich_help_panel=ASK)] = 64,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens with which all prompts begin alike (prefix caches).", rich_help_panel=ASK)
    ] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Make every answer --max-tokens long (vLLM, llama.cpp, loradock).", rich_help_panel=ASK
        ),
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=ASK)] = 0.0,
    endpoint: Annotated[
        str, typer.Option(metavar="chat|completions", help="Which of OpenAI's routes.", rich_help_panel=ASK)
    ] = "chat",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per server and level.", rich_help_panel=RUN)] = 5,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0, help="Requests before the first round, not counted. Default: one per stream.", rich_help_panel=LOAD
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Fixes the mix, arrivals and prompts, except for the prompts' openings.", rich_help_panel=RUN
        ),
    ] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request counts as failed.", rich_help_panel=LOAD)
    ] = 300.0,
    disturbed_above: Annotated[
        float,
        typer.Option(min=0.0, metavar="CORES", help="CPU use by others that spoils a round.", rich_help_panel=RUN),
    ] = 0.10,
    reruns: Annotated[
        int | None,
        typer.Option(
            min=0, help="Disturbed rounds to run again, per level. Default: as many as --rounds.", rich_help_panel=RUN
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORADOCK_KEY", help="Key for A.", rich_help_panel=SERVER)
    ] = None,
    vs_api_key: Annotated[
        str | None, typer.Option(envvar="LORADOCK_VS_KEY", help="Key for B.", rich_help_panel=SECOND)
    ] = None,
    dialect: Annotated[
        str, typer.Option(metavar="auto|openai|llama.cpp", help="How A names its adapters.", rich_help_panel=ASK)
    ] = "auto",
    vs_dialect: Annotated[
        str, typer.Option(metavar="auto|openai|llama.cpp", help="The same for B.", rich_help_panel=SECOND)
    ] = "auto",
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="More fields for every request to A.", rich_help_panel=ASK)
    ] = None,
    vs_extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="The same for B.", rich_help_panel=SECOND)
    ] = None,
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write everything raw; - prints it to stdout.", rich_help_panel=RUN
        ),
    ] = None,
) -> None:
    """Measure a running server, or two against each other.

    Any server with OpenAI's API is taken; it prints a table and writes JSON.
    Prompts share no beginning, tokens are counted by the server's usage, failed requests are errors and never
    throughput, and a round during which other processes were busy is run again.
    """
    if context.invoked_subcommand is not None:
        return
    from serve.client.bench.load import Settings

    try:
        settings = Settings(
            endpoint=_choice("--endpoint", endpoint, ("chat", "completions")),
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            shared_prefix=shared_prefix,
            ignore_eos=ignore_eos,
            temperature=temperature,
            requests=requests,
            duration=duration,
            rounds=rounds,
            warmup=warmup,
            zipf=_mix(adapter_mix),
            seed=seed,
            timeout=timeout,
            disturbed_above=disturbed_above,
            reruns=reruns,
        )
        levels = _levels(streams, rate)
        settings = _length(settings, levels)
        names = _names(adapters)
        sides = [_Side("A", _address(url, api_key), model or [], names, dialect, _json("--extra-body", extra_body))]
        if vs is not None:
            vs_extra = _json("--vs-extra-body", vs_extra_body)
            vs_names = _names(vs_adapters) or names
            sides.append(_Side("B", _address(vs, vs_api_key), vs_model or model or [], vs_names, vs_dialect, vs_extra))
        _comparable(sides)
        _writable(json_out)
    except ConfigError as wrong:
        _leave(wrong.message, 2)
    _run(sides, levels, settings, json_out)


@bench_app.command(
    epilog="""\b
Example:
  loradock bench swap tone --versions 1,2 --streams 16 --swaps 20
"""
)
def swap(
    name: Annotated[str, typer.Argument(help="An adapter with at least two versions that were trained to differ.")],
    url: Annotated[str, typer.Option(envvar="LORADOCK_URL", help="The server.")] = "http://127.0.0.1:8000",
    versions: Annotated[str, typer.Option(metavar="N,M", help="Which change places.")] = "1,2",
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 16,
    swaps: Annotated[int, typer.Option(min=1, help="How many promotes.")] = 20,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds between two of them.")] = 3.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may get.")] = 64,
    api_key: Annotated[str | None, typer.Option(envvar="LORADOCK_KEY", help="A key that may promote.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that swaps under load lose and mix nothing.

    Exit code 1 if one did. Each version is asked alone first; every answer under load must be, word for word, what the
    version that signed it says. Inter-token latency during the swaps is held against that of the phases before and
    after them.
    """
    from rich.console import Console

    from serve.client.bench import swap as proof
    from serve.client.bench.wire import WireError

    console = Console(stderr=True)
    try:
        numbers = tuple(_numbers("--versions", versions, int))
        if len(numbers) < 2:
            raise ConfigError(f"--versions takes two or more numbers, for instance 1,2; not {versions!r}")
        plan = proof.Plan(name, numbers, streams, swaps, every, max_tokens)
        address = _address(url, api_key)
    except ConfigError as wrong:
        _leave(wrong.message, 2)
    try:
        seen = asyncio.run(proof.prove(address, plan, lambda line: console.print(line, markup=False, highlight=False)))
    except (LoradockError, WireError) as cannot:
        _leave(str(cannot), 1)
    except KeyboardInterrupt:
        _leave("interrupted; nothing is reported of a run that is not whole", 130)
    if as_json:
        print(json.dumps(seen.as_dict(), indent=2))
    else:
        for key, value in seen.as_dict().items():
            print(f"{key.replace('_', ' '):<22} {value}")
    if not seen.holds:
        raise typer.Exit(1)


class _Side(NamedTuple):
    """One server to measure, as `rounds.find` takes it."""

    label: str
    address: Any
    models: list[str]
    adapters: list[str]
    dialect: Any
    extra: dict[str, Any]


def _comparable(sides: Sequence[_Side]) -> None:
    """Both servers must be asked for equally many names, in a dialect that is known."""
    first, last = sides[0], sides[-1]
    if len(first.adapters) != len(last.adapters):
        raise ConfigError(
            f"--adapters names {len(first.adapters)} and --vs-adapters {len(last.adapters)}; name equally many"
        )
    if first.models and len(first.models) != len(last.models):
        raise ConfigError(
            f"--model is given {len(first.models)} times and --vs-model {len(last.models)}; make them equal"
        )
    for side in sides:
        _choice("--dialect", side.dialect, ("auto", "openai", "llama.cpp"))


def _run(sides: list[_Side], levels: list[Level], settings: Settings, json_out: str | None) -> None:
    from rich.console import Console

    from serve.client.bench import report
    from serve.client.bench.rounds import CannotBench, find
    from serve.client.bench.rounds import bench as measure

    progress = _Progress(Console(stderr=True))

    async def run() -> Result:
        servers: list[Server] = [await find(*side) for side in sides]
        return await measure(servers, levels, settings, progress)

    try:
        with progress:
            result = asyncio.run(run())
    except CannotBench as cannot:
        _leave(str(cannot), 1)
    except KeyboardInterrupt:
        _leave("interrupted; nothing is reported of a run that is not whole", 130)
    if json_out == "-":
        sys.stdout.buffer.write(report.to_json(result))
        sys.stdout.flush()
    elif json_out is not None:
        Path(json_out).write_bytes(report.to_json(result))
    report.show(result, Console(stderr=json_out == "-"))
    if report.failures(result):
        raise typer.Exit(1)


class _Progress:
    """A bar on a terminal, a line per round elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            # Twice a second: drawing takes CPU from the server that is being measured.
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2, transient=True)
            self._task = self._bar.add_task("starting", total=None)
        self._shown: AbstractContextManager[Any] = self._bar or nullcontext()
        self._shown.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._shown.__exit__(*failure)  # type: ignore[arg-type]

    def begins(self, what: str, requests: int | None) -> None:
        if self._bar is not None:
            self._bar.reset(self._task, description=what, total=requests)

    def answered(self, answer: Answer) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def ended(self, round_: Round) -> None:
        from serve.client.bench.report import errors, measure

        figures = measure([round_])
        ttft, failed = figures["ttft_p50_s"], sum(errors([round_]).values())
        self.says(
            f"{round_.level}, round {round_.pair + 1}, {round_.server}: {figures['output_tok_s'] or 0:.1f} tokens/s"
            + (f", TTFT p50 {ttft * 1000:.0f} ms" if ttft is not None else "")
            + (f", {failed} FAILED" if failed else "")
            + (" (disturbed)" if round_.disturbed else "")
        )

    def says(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False)


def _levels(streams: str, rate: str | None) -> list[Level]:
    from serve.client.bench.load import Level

    if rate is not None:
        return [Level(rate=value) for value in _numbers("--rate", rate, float)]
    return [Level(streams=value) for value in _numbers("--streams", streams, int)]


def _length(settings: Settings, levels: list[Level]) -> Settings:
    from dataclasses import replace

    if settings.requests is not None and settings.duration is not None:
        raise ConfigError("--requests and --duration both say how long a round is; give one of them")
    if settings.requests is None and settings.duration is None:
        return replace(settings, requests=max(8, *(4 * (level.streams or 8) for level in levels)))
    return settings


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or any(not 0 < number < float("inf") for number in numbers):
        raise ConfigError(f"{option} takes positive numbers with commas between them, for instance 1,16; not {text!r}")
    return list(dict.fromkeys(numbers))


def _names(text: str | None) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text is not None else []
    if text is not None and not all(names):
        raise ConfigError(f"--adapters takes names with commas between them, for instance a,b,c; not {text!r}")
    return names


def _mix(text: str) -> float | None:
    name, _, exponent = text.partition(":")
    try:
        if name == "uniform" and not exponent:
            return None
        if name == "zipf" and 0 <= float(exponent or 1.0) < 100:
            return float(exponent or 1.0)
    except ValueError:
        pass
    raise ConfigError(f"--adapter-mix takes uniform, zipf or zipf:EXPONENT (for instance zipf:1.1); not {text!r}")


def _choice(option: str, text: str, allowed: tuple[str, ...]) -> Any:
    if text not in allowed:
        raise ConfigError(f"{option} takes {' or '.join(allowed)}; not {text!r}")
    return text


def _json(option: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text is not None else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f'{option} takes a JSON object, for instance {{"top_p": 0.9}}; not {text!r}')
    return value


def _address(url: str, key: str | None) -> Any:
    from serve.client.bench.wire import Address

    try:
        return Address(url, key)
    except ValueError as wrong:
        raise ConfigError(f"{wrong}") from wrong


def _writable(path: str | None) -> None:
    if path not in (None, "-") and not Path(str(path)).resolve().parent.is_dir():
        raise ConfigError(f"--json {path}: there is no such folder; make it, or write elsewhere")


def _leave(sentence: str, code: int) -> Any:
    typer.echo(f"loradock bench: {sentence}", err=True)
    raise typer.Exit(code)
