"""The report of a run: Markdown and HTML with plots, and every measurement as JSON."""

from __future__ import annotations

import html
import json
import logging
import os
from pathlib import Path

from optimize.pipeline.facts import Facts
from optimize.pipeline.markdown import to_markdown
from optimize.pipeline.plots import drawn

log = logging.getLogger(__name__)


def write(folder: Path, facts: Facts) -> None:
    """report.md, report.html, *.svg and measurements.json in `folder`."""
    folder.mkdir(parents=True)
    plots, markdown = [], to_markdown(facts)
    try:
        plots = drawn(folder, facts)
    except Exception as error:  # hours of work lie in this run: a picture never ends it
        log.warning("the report has no pictures", exc_info=not isinstance(error, ImportError))
        markdown += f"\n{_without_pictures(error)}\n"
    pictures = "".join(f"\n![{title}]({file})\n" for file, title in plots)
    (folder / "report.md").write_text(markdown + pictures)
    (folder / "report.html").write_text(_page(facts, markdown, folder, plots))
    measured = {
        "scores": facts.scores,
        "gate": [verdict.plain() for verdict in facts.verdicts],
        "steps": [{"step": done.kind, "notes": done.notes, "done_before": not done.redone} for done in facts.done],
        "cores": len(os.sched_getaffinity(0)),
    }
    (folder / "measurements.json").write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")


def _without_pictures(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "This report has no pictures: matplotlib is not installed (pip install 'loradock[optimize]')."
    return f"This report has no pictures: they could not be drawn ({type(error).__name__}: {error})."


def _page(facts: Facts, markdown: str, folder: Path, plots: list[tuple[str, str]]) -> str:
    """The same as a page that needs nothing beside it."""
    body: list[str] = []
    rows: list[str] = []
    items: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("- "):
            items.append(f"<li>{_inline(line.removeprefix('- '))}</li>")
            continue
        if items:
            body.append("<ul>" + "".join(items) + "</ul>")
            items = []
        if line.startswith("|"):
            if not line.startswith("|---"):
                tag = "th" if not rows else "td"
                cells = line.strip("|").split("|")
                rows.append("<tr>" + "".join(f"<{tag}>{_inline(cell.strip())}</{tag}>" for cell in cells) + "</tr>")
            continue
        if rows:
            body.append("<table>" + "".join(rows) + "</table>")
            rows = []
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            body.append(f"<h{level}>{_inline(line.lstrip('# '))}</h{level}>")
        elif line:
            body.append(f"<p>{_inline(line)}</p>")
    for file, title in plots:
        svg = (folder / file).read_text()
        body.append(f"<h2>{html.escape(title)}</h2>" + svg[svg.index("<svg") :])
    style = "body{font:15px sans-serif;max-width:960px;margin:2em auto}"
    style += "td,th{padding:2px 12px;text-align:left;border-bottom:1px solid #ddd}"
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(facts.name)}</title><style>{style}</style>"
        + "\n".join(body)
        + "\n"
    )


def _inline(text: str) -> str:
    parts = html.escape(text).split("**")
    return "".join(f"<b>{part}</b>" if at % 2 else part for at, part in enumerate(parts))
