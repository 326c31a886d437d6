"""`loradock finetune`: examples in a file become a version of an adapter, trained by the server.

Exit codes: 0 done, 1 the server refused or the job failed, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve.cli.arguments import Commands
from serve.cli.terminal import URL, Json, Key, Url, age, example, say, table, told

if TYPE_CHECKING:
    from serve.client.fine_tuning_client import FineTuningClient

finetune_app = typer.Typer(
    name="finetune",
    help="Train adapters on the server, from files of examples.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

# How help groups the options of `create`.
TRAINING = "Training"

Id = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `list` shows it.")]


@contextmanager
def _connected(url: str, key: str | None) -> Iterator[FineTuningClient]:
    from serve.client.fine_tuning_client import FineTuningClient

    with told("finetune"), FineTuningClient(url, key) as client:
        yield client


@finetune_app.command(
    epilog=example(
        "loradock finetune create train.jsonl --model smollm2 --name tone --wait",
        "loradock finetune create pairs.jsonl --model tone --method dpo --validation held-out.jsonl",
    )
)
def create(  # long: a parameter is an option
    examples: Annotated[
        Path,
        typer.Argument(
            metavar="EXAMPLES", help="JSON lines, as OpenAI's fine-tuning takes.", exists=True, dir_okay=False
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="The base, or the adapter (NAME, NAME@v3) to go on from.")],
    name: Annotated[str, typer.Option("--name", help="The adapter that the result is a version of.")] = "",
    validation: Annotated[
        Path | None, typer.Option("--validation", help="Examples that are held out.", exists=True, dir_okay=False)
    ] = None,
    method: Annotated[
        Literal["supervised", "dpo"], typer.Option("--method", rich_help_panel=TRAINING, help="How it learns.")
    ] = "supervised",
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, rich_help_panel=TRAINING, help="Times that each example is seen.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, rich_help_panel=TRAINING, help="Examples of a step.")
    ] = None,
    multiplier: Annotated[
        float | None,
        typer.Option(
            "--learning-rate-multiplier", rich_help_panel=TRAINING, help="Of the learning rate that is chosen."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, rich_help_panel=TRAINING, help="Of the LoRA.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, rich_help_panel=TRAINING, help="The same one gives the same adapter.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until its end, and say what happens.")] = False,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Train an adapter on a file of examples.

    The file is sent to the server; the result is a version of the adapter.
    """
    given = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": multiplier, "rank": rank}
    hyperparameters = {option: value for option, value in given.items() if value is not None}
    with _connected(url, key) as client:
        asked: dict[str, Any] = {
            "model": model,
            "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        }
        asked |= {"suffix": name} if name else {}
        asked |= {"seed": seed} if seed is not None else {}
        job = client.train(asked, examples, validation)
        if wait:
            job = client.ended(job["id"], lambda message: typer.echo(message, err=True))
    say(job, as_json, _line)
    if job["status"] in ("failed", "cancelled"):
        raise typer.Exit(1)


@finetune_app.command("list", epilog=example("loradock finetune list", "loradock finetune list --limit 100 --json"))
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="So many, the latest.")] = 20,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the jobs, the latest first.

    Those of this key's tenant.
    """
    with _connected(url, key) as client:
        answer = client.jobs(limit)
    say(answer, as_json, _table)


@finetune_app.command(epilog=example("loradock finetune show ftjob-0123", "loradock finetune show ftjob-0123 --json"))
def show(id: Id, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Show a job: its state, checkpoints, and why it failed."""
    with _connected(url, key) as client:
        answer = client.job(id) | {"checkpoints": client.checkpoints(id)["data"]}
    say(answer, as_json, _page)


@finetune_app.command(epilog=example("loradock finetune events ftjob-0123 --limit 100"))
def events(
    id: Id,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="So many, the latest.")] = 20,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what happened to a job, the latest last."""
    with _connected(url, key) as client:
        answer = client.events(id, limit)
    say(answer, as_json, _events)


@finetune_app.command(epilog=example("loradock finetune cancel ftjob-0123"))
def cancel(id: Id, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """End a job; nothing of its training is kept."""
    _changed(id, "cancel", url, key, as_json)


@finetune_app.command(epilog=example("loradock finetune pause ftjob-0123"))
def pause(id: Id, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Stop training for now."""
    _changed(id, "pause", url, key, as_json)


@finetune_app.command(epilog=example("loradock finetune resume ftjob-0123"))
def resume(id: Id, url: Url = URL, key: Key = None, as_json: Json = False) -> None:
    """Go on with a paused job."""
    _changed(id, "resume", url, key, as_json)


@finetune_app.command(
    epilog=example(
        "loradock keys create box-1 --scope finetune:work --json | jq -r .secret > key",
        "LORADOCK_KEY=$(cat key) loradock finetune worker --url https://llm.example.org --base /models/llama",
    )
)
def worker(
    base: Annotated[
        list[str] | None,
        typer.Option(
            "--base", help="A base that this machine has: a directory, or smollm2 (the default); again for more."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where jobs lie until they are over (default: worker, in loradock's cache)."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when there is no job.")] = False,
    url: Annotated[str, typer.Option("--url", "--server", envvar="LORADOCK_URL", help="The server.")] = URL,
    key: Annotated[
        str | None, typer.Option("--key", envvar="LORADOCK_KEY", help="An API key with the scope finetune:work.")
    ] = None,
) -> None:
    """Train a server's jobs on this machine.

    Until SIGTERM or Ctrl+C.
    """
    import signal

    from serve.client.fine_tuning_work_client import WorkClient
    from serve.config import Config
    from serve.jobs.finetuning.remote_worker import Bases, Worker, named
    from serve.server.launch import own
    from serve.server.logs import log_to_stderr

    log_to_stderr("info")
    cache = Config().cache_dir
    place = folder or cache / "worker"
    with told("finetune"), own(place), WorkClient(url, key, named(place)) as client:
        working = Worker(client, place, Bases.of(base or ["smollm2"], cache))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: working.stop())
        working.run(once=once)


def _changed(id: str, verb: str, url: str, key: str | None, as_json: bool) -> None:
    with _connected(url, key) as client:
        answer = client.change(id, verb)
    say(answer, as_json, _line)


def _line(job: dict[str, Any]) -> str:
    if job["status"] == "succeeded":
        return f"{job['id']} succeeded: {job['fine_tuned_model']}"
    if job["status"] == "failed":
        return f"{job['id']} failed: {job['error']['message']}"
    return f"{job['id']} is {job['status']}"


def _table(answer: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("JOB", "STATUS", "FROM", "MODEL", "CREATED")]
    for job in answer["data"]:
        made = job["fine_tuned_model"] or "-"
        rows.append((job["id"], job["status"], job["model"], made, f"{age(job['created_at'], time.time())} ago"))
    return table(rows) if len(rows) > 1 else "no job was made yet"


def _page(job: dict[str, Any]) -> str:
    lines = [_line(job), f"from {job['model']}, {job['method']['type']}, seed {job['seed']}"]
    lines.append(", ".join(f"{name} {value}" for name, value in job["hyperparameters"].items()))
    if finish := job["estimated_finish"]:
        lines.append(f"about {age(time.time(), finish)} left")
    rows: list[tuple[str, ...]] = [("STEP", "MODEL", "TRAIN LOSS", "VALID LOSS")]
    for checkpoint in job["checkpoints"]:
        losses = [checkpoint["metrics"].get(name) for name in ("train_loss", "full_valid_loss")]
        shown = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        rows.append((str(checkpoint["step_number"]), checkpoint["fine_tuned_model_checkpoint"], *shown))
    return "\n".join([*lines, *([table(rows)] if len(rows) > 1 else [])])


def _events(answer: dict[str, Any]) -> str:
    rows = [
        (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["created_at"])), event["level"], event["message"])
        for event in reversed(answer["data"])
    ]
    return table(rows) if rows else "nothing happened yet"
