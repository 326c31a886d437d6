"""`loradock data`: training data out of what an adapter was asked.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli.arguments import Commands, parse_share
from serve.cli.terminal import URL, Json, Key, Url, age, example, say, table, told, write_answer

if TYPE_CHECKING:
    from serve.client.data_client import DataClient

# Seconds: a hundred thousand requests take their time.
PATIENCE = 3600.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_WHY = {
    "rated_down": "rated down",
    "not_approved": "nobody said anything of the answer",
    "cut_off": "the answer was cut off",
    "other_form": "of the other form, chat or prompt",
    "golden": "asks what the golden set asks",
    "held_out_before": "asks what an earlier build held out",
    "duplicate": "asks the same as another",
    "near_duplicate": "asks and answers nearly the same",
    "near_held_out": "asks what is held out",
    "balance": "its day, topic or asker has more than its share",
    "limit": "above the limit",
}

data_app = typer.Typer(
    name="data",
    help="Make training data out of an adapter's traffic.",
    no_args_is_help=True,
    rich_markup_mode=None,
    cls=Commands,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]


@contextmanager
def _connected(url: str, key: str | None) -> Iterator[DataClient]:
    from serve.client.data_client import DataClient

    with told("data"), DataClient(url, key, timeout=PATIENCE) as client:
        yield client


@data_app.command(
    epilog=example(
        "loradock data build tone --since 7d --out data",
        "loradock finetune create data/train.jsonl --model tone --validation data/held_out.jsonl --wait",
    )
)
def build(  # long: a parameter is an option
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", help="A folder to write the files and the card into.")] = None,
    since: Annotated[str, typer.Option("--since", help="How long ago at most, as 7d, 12h, 30m; else all.")] = "",
    until: Annotated[str, typer.Option("--until", help="How long ago at least.")] = "",
    held_out: Annotated[
        float,
        typer.Option("--held-out", parser=parse_share, help="The part of the conversations to measure with, as 10%."),
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split and of all lots.")] = 0,
    unrated: Annotated[bool, typer.Option("--unrated", help="Answers count too that nobody said anything of.")] = False,
    bases: Annotated[bool, typer.Option("--bases", help="What the base was asked counts too.")] = False,
    max_examples: Annotated[int, typer.Option("--max-examples", min=1, help="To train on, at most.")] = 10_000,
    balance: Annotated[
        float, typer.Option("--balance", min=1, help="Times its even share that a day, topic or asker may have.")
    ] = 3.0,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make files of examples out of rated answers.

    Corrected and well rated ones; it says how much came from where.
    """
    now = time.time()
    asked: dict[str, Any] = {"since": now - _seconds(since, "--since")} if since else {}
    asked |= {"until": now - _seconds(until, "--until")} if until else {}
    asked |= {"held_out": held_out, "seed": seed, "unrated": unrated, "bases": bases}
    asked |= {"max_examples": max_examples, "balance": balance}
    with _connected(url, key) as client:
        built = client.build(name, asked, lambda how_far: typer.echo(_progress(how_far), err=True))
        if out is not None:
            client.save(built, out)
            write_answer(out / "card.json", (json.dumps(built["card"], indent=2, ensure_ascii=False) + "\n").encode())
    say(built, as_json, lambda built: _card(built, out))


@data_app.command("list", epilog=example("loradock data list tone", "loradock data list tone --limit 1000 --json"))
def list_conversations(
    name: Name,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="So many, the latest.")] = 20,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the captured conversations of an adapter.

    The latest first, without what was said.
    """
    with _connected(url, key) as client:
        answer = client.conversations(name, limit)
    say(answer, as_json, lambda answer: _table(answer, name))


@data_app.command(epilog=example("loradock data delete tone chatcmpl-8c1f0e6d"))
def delete(
    name: Name,
    id: Annotated[str, typer.Argument(metavar="ID", help="The conversation's id, or that of one of its answers.")],
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Delete a captured conversation.

    No later build has any of it.
    """
    with _connected(url, key) as client:
        answer = client.delete(name, id)
    say(answer, as_json, lambda answer: f"{answer['id']} is deleted, {answer['requests']} requests")


def _seconds(text: str, option: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{option} takes a number with s, m, h or d, as 7d, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _progress(how_far: dict[str, Any]) -> str:
    if how_far["doing"] is None:
        return "waiting"
    of = f" of {how_far['of']:,}" if how_far["of"] else ""
    return f"{how_far['doing']}: {how_far['done']:,}{of}"


def _card(built: dict[str, Any], out: Path | None) -> str:
    card = built["card"]
    counts, sources = card["examples"], card["sources"]
    sides: list[tuple[str, ...]] = [("", "TRAIN", "HELD OUT")]
    rows = [(name.replace("_", " "), sources["train"][name], sources["held_out"][name]) for name in sources["train"]]
    rows += [("conversations", card["conversations"]["train"], card["conversations"]["held_out"])]
    sides += [(name, *(f"{count:,}" for count in both)) for name, *both in rows]
    learned, held_out = f"{counts['train']:,}", f"{counts['held_out']:,}"
    lines = [
        f"{learned} examples to train on and {held_out} held out, of {card['captured']:,} requests",
        f"{counts['preferences']:,} pairs of a better and a worse answer",
        table(sides),
    ]
    if first := card["span"]["first"]:
        day = [time.strftime("%Y-%m-%d %H:%M", time.gmtime(moment)) for moment in (first, card["span"]["last"])]
        lines.append(
            f"from {day[0]} to {day[1]} UTC: {card['days']} days, {len(card['topics'])} topics, {card['askers']} askers"
        )
    lines += _section("dropped", {_WHY.get(why, why): count for why, count in card["dropped"].items()})
    lines += _section("not captured", {why.replace("_", " "): count for why, count in card["not_captured"].items()})
    blacked_out = card["personal_data"]["blacked_out"]
    lines += _section("blacked out", {kind.replace("_", " "): count for kind, count in blacked_out.items()})
    lines += [f"{kind.replace('_', ' ')}: {built[kind]}" for kind in built if kind.endswith("_file") and built[kind]]
    return "\n".join([*lines, *([f"written to {out}"] if out else [])])


def _section(title: str, counts: dict[str, int]) -> list[str]:
    return [f"{title}:", *(f"  {count:,}  {what}" for what, count in counts.items())] if counts else []


def _table(answer: dict[str, Any], name: str) -> str:
    now = time.time()
    rows: list[tuple[str, ...]] = [("CONVERSATION", "REQUESTS", "RATED", "CORRECTED", "LAST", "AN ANSWER")]
    for row in answer["data"]:
        counts = (str(row[count]) for count in ("requests", "rated", "corrected"))
        rows.append((row["id"], *counts, f"{age(row['last'], now)} ago", row["request_ids"][0]))
    if len(rows) > 1:
        return table(rows)
    why = "" if answer["learns"] else ", and none is: its policy does not say `train_on_traffic: true`"
    return f"no conversation with {name} is kept{why}"
