"""`loradock usage`: what each tenant used in a month, and what it cost.

Exit codes: 0 done, 1 the server refused, 2 the command is wrong, 3 no server answered.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from serve.cli.terminal import URL, Json, Key, Url, connected, say, table

COLUMNS = (
    *("tenant", "adapter", "requests", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("engine_seconds", "cost"),
)
CAUSE = "cause"


def usage(
    month: Annotated[
        str | None, typer.Option("--month", metavar="YYYY-MM", help="The month, by UTC (default: this one).")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of one tenant alone.")] = None,
    causes: Annotated[bool, typer.Option("--causes", help="A line for each thing that the tokens were for.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    url: Url = URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show requests, tokens and cost of a month, by tenant.

    And engine time, by adapter.
    """
    with connected("usage", url, key) as client:
        answer = client.usage(month, tenant)
    columns = (*COLUMNS[:2], CAUSE, *COLUMNS[2:]) if causes else COLUMNS
    say(answer, as_json, partial(_as_csv if as_csv else _as_table, columns=columns))


def _as_csv(answer: dict[str, Any], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("month", *columns, "currency"))
    for row in _rows(answer, columns):
        writer.writerow((answer.get("month"), *(row.get(column) for column in columns), answer.get("currency")))
    return text.getvalue().rstrip("\n")


def _rows(answer: dict[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """By tenant and adapter; and by cause, where that is a column. What has none is from before causes were counted."""
    rows: list[dict[str, Any]] = answer.get("data", [])
    if CAUSE not in columns:
        return rows
    return [{**row, CAUSE: cause, **part} for row in rows for cause, part in (row.get("causes") or {"": {}}).items()]


def _as_table(answer: dict[str, Any], columns: Sequence[str]) -> str:
    rows = _rows(answer, columns)
    if not rows:
        return f"nothing was used in {answer.get('month')}"
    currency = answer.get("currency") or ""
    titles = [column.replace("_", " ").upper() for column in columns]
    titles[-1] = f"COST {currency}".strip()
    total = {**answer.get("total", {}), "tenant": "total", "adapter": ""}
    lines = [tuple(titles), *(_cells(row, columns) for row in [*rows, total])]
    # Without prices everything would be said to cost nothing.
    return table(lines if total.get("cost") else [line[:-1] for line in lines])


def _cells(row: dict[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    words = [str(row.get(column, "")) for column in columns[:-2]]
    return (*words, f"{row.get('engine_seconds', 0):.1f}", f"{row.get('cost', 0):.4f}")
