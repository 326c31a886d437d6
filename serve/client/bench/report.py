"""Figures from rounds: per round, over rounds, and as ratios of pairs; as a table and as JSON.

A failed request is counted as an error and never as throughput or latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import msgspec

from serve.client.bench.load import Answer, Level
from serve.client.bench.rounds import Result, Round

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table; `better` says which way a reader should hope."""

    key: str
    title: str
    better: str  # "more" or "less"
    show: Callable[[float], str]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ms(value: float) -> str:
    return f"{value * 1000:,.0f} ms" if value >= 0.1 else f"{value * 1000:.1f} ms"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


METRICS = (
    Metric("output_tok_s", "output tokens/s", "more", _plain),
    Metric("total_tok_s", "total tokens/s", "more", _plain),
    Metric("requests_s", "requests/s", "more", lambda value: f"{value:.2f}"),
    Metric("ttft_p50_s", "TTFT p50", "less", _ms),
    Metric("ttft_p99_s", "TTFT p99", "less", _ms),
    Metric("itl_p50_s", "ITL p50", "less", _ms),
    Metric("itl_p99_s", "ITL p99", "less", _ms),
    Metric("itl_max_s", "ITL worst gap", "less", _ms),
    Metric("tpot_mean_s", "time per token, mean", "less", _ms),
    Metric("e2e_p50_s", "end to end p50", "less", _ms),
    Metric("e2e_p99_s", "end to end p99", "less", _ms),
    Metric("server_rss", "server memory (RSS)", "less", _mib),
    Metric("server_cores", "server cores in use", "less", lambda value: f"{value:.2f}"),
    Metric("server_cpu_s_per_ktok", "server CPU s / 1000 tokens", "less", lambda value: f"{value:.2f}"),
)


def measure(rounds: Sequence[Round]) -> dict[str, float | None]:
    """The figures of one or more rounds of one server; latencies are pooled, rates are over the summed wall time."""
    good = [answer for round_ in rounds for answer in round_.answers if answer.error is None]
    wall = sum(round_.wall_s for round_ in rounds)
    output = sum(answer.output_tokens for answer in good)
    uses = [round_.use for round_ in rounds if round_.use is not None]
    cpu = [use.server_cpu_s for use in uses if use.server_cpu_s is not None]
    ttft = [answer.ttft for answer in good if answer.ttft is not None]
    gaps = [gap / 1000 for answer in good for gap in answer.gaps_ms]
    e2e = [answer.end - answer.due for answer in good]
    return {
        "output_tok_s": output / wall if wall else None,
        "total_tok_s": sum(answer.prompt_tokens + answer.output_tokens for answer in good) / wall if wall else None,
        "requests_s": len(good) / wall if wall else None,
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p99_s": percentile(ttft, 99),
        "itl_p50_s": percentile(gaps, 50),
        "itl_p99_s": percentile(gaps, 99),
        "itl_max_s": max(gaps, default=None),
        "tpot_mean_s": _mean(_tpot(answer) for answer in good),
        "e2e_p50_s": percentile(e2e, 50),
        "e2e_p99_s": percentile(e2e, 99),
        "server_rss": max((use.server_rss for use in uses if use.server_rss is not None), default=None),
        "server_pss": max((use.server_pss for use in uses if use.server_pss is not None), default=None),
        "server_cores": sum(cpu) / wall if cpu and wall else None,
        "server_cpu_s_per_ktok": sum(cpu) / output * 1000 if cpu and output else None,
        "client_cores": sum(round_.client_cpu_s for round_ in rounds) / wall if wall else None,
        "prompt_tokens_mean": _mean(float(answer.prompt_tokens) for answer in good),
        "output_tokens_mean": _mean(float(answer.output_tokens) for answer in good),
        "tokens_per_gap": _mean((answer.output_tokens - 1) / len(answer.gaps_ms) for answer in good if answer.gaps_ms),
    }


def errors(rounds: Iterable[Round]) -> dict[str, int]:
    return dict(Counter(answer.error for round_ in rounds for answer in round_.answers if answer.error is not None))


def standing(result: Result, level: Level) -> tuple[list[int], bool]:
    """The pairs whose last attempt was not disturbed; all of them, and False, when there is no such pair."""
    last = _last_attempts(result, level)
    clean = [pair for pair, rounds in last.items() if not any(round_.disturbed for round_ in rounds.values())]
    return (clean, True) if clean else (list(last), False)


def summarize(result: Result) -> dict[str, Any]:
    """Everything a table or a script wants to know, per level."""
    return {"levels": [_level(result, level) for level in result.levels], "errors": failures(result)}


def failures(result: Result) -> int:
    """Failed requests in the whole run, disturbed rounds and warm-up included."""
    warmup = sum(sum(kinds.values()) for kinds in result.warmup_errors.values())
    return warmup + sum(errors(result.rounds).values())


def to_json(result: Result) -> bytes:
    """The whole run, raw: every request with its times and gaps."""
    rounds = [asdict(round_) | {"figures": measure([round_])} for round_ in result.rounds]
    whole = {
        "loradock_bench": FORMAT,
        "started": result.started,
        "seconds": result.seconds,
        "machine": result.machine,
        "settings": result.settings,
        "servers": result.servers,
        "prompts": {"run": result.prompt_run, "scale": result.scale},
        "summary": summarize(result),
        "warmup_errors": result.warmup_errors,
        "rounds": rounds,
    }
    return msgspec.json.encode(whole) + b"\n"


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Linear between the two nearest ranks, as numpy does it; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _level(result: Result, level: Level) -> dict[str, Any]:
    pairs, clean = standing(result, level)
    last = _last_attempts(result, level)
    of_level = [round_ for round_ in result.rounds if round_.level == level]
    servers = {}
    per_round: dict[str, list[dict[str, float | None]]] = {}
    for server in result.servers:
        label = server["label"]
        rounds = [last[pair][label] for pair in pairs]
        per_round[label] = [measure([round_]) for round_ in rounds]
        every = [round_ for round_ in of_level if round_.server == label]
        servers[label] = {
            "figures": measure(rounds),
            "spread": {metric.key: _spread(figures[metric.key] for figures in per_round[label]) for metric in METRICS},
            "requests": sum(len(round_.answers) for round_ in every),
            "errors": errors(every),
            "error_examples": _examples(every),
            "counted_by": sorted({answer.counted_by for round_ in every for answer in round_.answers}),
        }
    summary: dict[str, Any] = {
        "level": str(level),
        "streams": level.streams,
        "rate": level.rate,
        "rounds_used": len(pairs),
        "rounds_run": len({(round_.pair, round_.attempt) for round_ in of_level}),
        "disturbed": len({(round_.pair, round_.attempt) for round_ in of_level if round_.disturbed}),
        "clean": clean,
        "servers": servers,
    }
    if len(result.servers) == 2:
        ours, theirs = (per_round[server["label"]] for server in result.servers)
        summary["ratios"] = {metric.key: _ratios(metric.key, ours, theirs) for metric in METRICS}
    return summary


def _ratios(
    key: str, ours: Sequence[dict[str, float | None]], theirs: Sequence[dict[str, float | None]]
) -> dict[str, Any] | None:
    """A over B, pair by pair; the median and the spread are of these ratios, not of the averages."""
    pairs = [(our[key], their[key]) for our, their in zip(ours, theirs, strict=True)]
    ratios = [our / their for our, their in pairs if our is not None and their]
    spread = _spread(ratios)
    return None if spread is None else {**spread, "pairs": [round(ratio, 4) for ratio in ratios]}


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"median": median(known), "min": min(known), "max": max(known)} if known else None


def _last_attempts(result: Result, level: Level) -> dict[int, dict[str, Round]]:
    last: dict[int, dict[str, Round]] = {}
    for round_ in result.rounds:
        if round_.level == level:
            last.setdefault(round_.pair, {})[round_.server] = round_
    return last


def _examples(rounds: Iterable[Round]) -> dict[str, str]:
    """The first message of each kind of error."""
    examples: dict[str, str] = {}
    for round_ in rounds:
        for answer in round_.answers:
            if answer.error is not None:
                examples.setdefault(answer.error, f"{answer.model}: {answer.message}")
    return examples


def _tpot(answer: Answer) -> float | None:
    """Seconds per output token after the first."""
    if answer.first is None or answer.last is None or answer.output_tokens < 2:
        return None
    return (answer.last - answer.first) / (answer.output_tokens - 1)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# -- the table


def show(result: Result, console: Console) -> None:
    """Print the tables, and below them everything that a reader should know before quoting a figure."""
    summary = summarize(result)
    for server in result.servers:
        names = server["models"]
        asked = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        where = ", ".join(process["name"] for process in server["processes"]) or "not a process of this machine"
        console.print(f"{server['label']} = {server['url']}  ({asked}; {where})", markup=False, highlight=False)
    if len(result.servers) == 2:
        for level in summary["levels"]:
            console.print(_duel(result, level))
    else:
        console.print(_single(result, summary["levels"]))
    for note in notes(result, summary):
        console.print(f"! {note}", markup=False, highlight=False, style="yellow")


def notes(result: Result, summary: dict[str, Any]) -> list[str]:
    """What stands behind the figures, in sentences: errors first."""
    sentences: list[str] = []
    for where, kinds in result.warmup_errors.items():
        sentences.append(f"{where}: warm-up requests failed: {_kinds(kinds)}")
    for level in summary["levels"]:
        for label, server in level["servers"].items():
            figures = server["figures"]
            for kind, count in server["errors"].items():
                example = server["error_examples"][kind]
                sentences.append(
                    f"{label}, {level['level']}: {count} of {server['requests']} failed: {kind} ({example})"
                )
            if "chunks" in server["counted_by"] and figures["output_tok_s"]:
                sentences.append(
                    f"{label}, {level['level']}: no usage in some answers, their tokens are counted by chunks"
                )
            if (figures["client_cores"] or 0) > 0.25:
                sentences.append(f"{label}, {level['level']}: this client took {figures['client_cores']:.0%} of a core")
            wanted, length = result.settings.max_tokens, figures["output_tokens_mean"]
            if length and length < 0.98 * wanted:
                sentences.append(
                    f"{label}, {level['level']}: answers end after {length:.1f} tokens on average, not {wanted};"
                    " --ignore-eos makes lengths equal where the server knows it"
                )
        if level["disturbed"]:
            used = "the figures are from the others" if level["clean"] else "ALL FIGURES ARE FROM DISTURBED ROUNDS"
            sentences.append(
                f"{level['level']}: {level['disturbed']} of {level['rounds_run']} rounds disturbed; {used}"
            )
    return sentences + _machine_notes(result)


def _machine_notes(result: Result) -> list[str]:
    uses = [round_.use for round_ in result.rounds if round_.use is not None]
    if not uses:
        return ["/proc is not readable here: what other processes did meanwhile is unknown"]
    others = [use.disturbance for use in uses]
    sentences = [f"other processes used {median(others):.0%} of a core (median of rounds; worst {max(others):.0%})"]
    idle = max(use.idle_servers_cpu_s / use.wall_s for use in uses)
    if idle > 0.02:
        sentences.append(f"the server that was not asked used up to {idle:.0%} of a core meanwhile")
    client = [round_.client_cpu_s / round_.wall_s for round_ in result.rounds if round_.wall_s]
    return [*sentences, f"this client used {median(client):.1%} of a core (worst {max(client):.1%})"]


def _kinds(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _title(result: Result, level: dict[str, Any]) -> str:
    first = next(iter(level["servers"].values()))["figures"]
    asked = first["prompt_tokens_mean"] or result.settings.prompt_tokens
    return f"{level['level']} · {asked:.0f} prompt + {first['output_tokens_mean'] or 0:.0f} output tokens"


def _duel(result: Result, level: dict[str, Any]) -> Any:
    from rich.table import Table

    first, second = (server["label"] for server in result.servers)
    table = Table(title=f"{_title(result, level)} · {level['rounds_used']} paired rounds", title_justify="left")
    table.add_column("")
    for label in (first, second):
        table.add_column(label, justify="right")
    table.add_column(f"{first} / {second}, median of pairs", justify="right")
    table.add_column("min .. max", justify="right")
    for metric in METRICS:
        values = [level["servers"][label]["figures"][metric.key] for label in (first, second)]
        ratio = level["ratios"][metric.key]
        cells = [metric.show(value) if value is not None else "-" for value in values]
        tail = [f"{ratio['median']:.3f}", f"{ratio['min']:.3f} .. {ratio['max']:.3f}"] if ratio else ["-", "-"]
        table.add_row(metric.title, *cells, *tail)
    table.add_row(
        "errors", *[str(sum(level["servers"][label]["errors"].values())) for label in (first, second)], "", ""
    )
    return table


def _single(result: Result, levels: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    label = result.servers[0]["label"]
    table = Table(title=f"{result.servers[0]['url']} (all rounds pooled; min .. max of rounds)", title_justify="left")
    table.add_column("")
    for level in levels:
        table.add_column(_title(result, level).replace(" · ", "\n"), justify="right")
    for metric in METRICS:
        table.add_row(metric.title, *[_cell(level["servers"][label], metric) for level in levels])
    table.add_row("errors", *[str(sum(level["servers"][label]["errors"].values())) for level in levels])
    return table


def _cell(server: dict[str, Any], metric: Metric) -> str:
    value = server["figures"][metric.key]
    if value is None:
        return "-"
    spread = server["spread"][metric.key]
    low, high = metric.show(spread["min"]), metric.show(spread["max"])
    return metric.show(value) if low == high else f"{metric.show(value)} ({low.removesuffix(' ms')} .. {high})"
