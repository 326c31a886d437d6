"""The report of a run: Markdown and HTML with plots, and every measurement as JSON."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimize.pipeline.facts import Facts
from optimize.pipeline.gate import Verdict


def write(folder: Path, facts: Facts) -> None:
    """report.md, report.html, *.svg and measurements.json in `folder`."""
    folder.mkdir(parents=True)
    plots = _plots(folder, facts)
    told = told_in_markdown(facts)
    pictures = "".join(f"\n![{title}]({file})\n" for file, title in plots)
    (folder / "report.md").write_text(told + pictures)
    (folder / "report.html").write_text(_page(facts, told, folder, plots))
    measured = {
        "scores": facts.scores,
        "gate": [verdict.plain() for verdict in facts.verdicts],
        "steps": [{"step": done.kind, "notes": done.notes, "done_before": not done.redone} for done in facts.done],
        "cores": len(os.sched_getaffinity(0)),
    }
    (folder / "measurements.json").write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")


def told_in_markdown(facts: Facts) -> str:
    scores = facts.scores
    lines = [
        f"# {facts.name}",
        "",
        f"From {facts.plan.model.name}. Gate: {'passed' if facts.passed else '**not passed**'}.",
        "",
    ]
    rows: list[tuple[str, ...]] = [("", "original", "result", "")]
    if "perplexity" in scores:
        rows.append(
            (
                "perplexity",
                f"{scores['perplexity_original']:.2f}",
                f"{scores['perplexity']:.2f}",
                f"{scores['perplexity_increase']:+.2%}",
            )
        )
        rows.append(("KL from the original, nats", "0", f"{scores['kl']:.4f}", ""))
        rows.append(("same likeliest token", "100 %", f"{scores['top1']:.1%}", ""))
        before, after = scores["bytes_original"], scores["bytes"]
        rows.append(("weights, MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before:.2f}"))
    if "tokens_ratio" in scores:
        rows.append(("tokens for the same text", "1", f"{scores['tokens_ratio']:.3f}", ""))
    if "engine" in scores:
        old, new = scores["engine"]["original"], scores["engine"]["result"]
        for streams in ("1", "16"):
            rows.append(
                (
                    f"tokens/s, {streams} streams", f"{old['tokens_per_second'][streams]:.1f}",
                    f"{new['tokens_per_second'][streams]:.1f}", f"{scores[f'speed_{streams}']:.2f} x",
                )
            )  # fmt: skip
        rows.append(("load, s", f"{old['load_seconds']:.1f}", f"{new['load_seconds']:.1f}", ""))
    if "healed" in scores:
        rows.append(("lost log-perplexity healed", "", f"{scores['healed']:.1%}", ""))
    lines += _table(rows)
    if tasks := scores.get("tasks"):
        lines += ["", "## Tasks", ""]
        lines += _table([("task", "score", "original", "result")] + [
            (task, metric.partition(",")[0], f"{was:.3f}", f"{tasks['result'][task][metric]:.3f}")
            for task, found in tasks["original"].items()
            for metric, was in found.items()
        ])  # fmt: skip
    if facts.verdicts:
        lines += ["", "## Gate", ""]
        lines += _table([("bound", "limit", "measured", "holds")] + [
            _judged(verdict)
            for verdict in facts.verdicts
        ])  # fmt: skip
    lines += ["", "## Steps", ""]
    steps = [("step", "options", "seconds", "of a processor", "memory, GB")]
    for done in facts.done:
        options = {name: value for name, value in done.options.items() if value not in (0, 0.0, [], ())}
        steps.append(
            (
                done.kind,
                ", ".join(f"{name} {value}" for name, value in options.items()),
                f"{done.seconds:.0f}",
                f"{done.notes.get('cpu_seconds', 0):.0f}",
                f"{done.notes.get('memory', 0) / 1e9:.2f}",
            )
        )
    lines += _table(steps)
    for done in facts.done:
        if found := _found(done.kind, done.options, done.notes):
            lines += ["", found]
        if "vocabulary_before" in done.notes:
            was, now = done.notes["vocabulary_before"], done.notes["vocabulary"]
            covered = f"{done.notes['covered']:.2%} of the calibration text's tokens stay as they were"
            lines += ["", f"Vocabulary: {now} tokens of {was}; {covered}."]
        if "zeros" in done.notes:
            lines += ["", f"{done.notes['zeros']:.1%} of the weights in {done.notes['layers']} matrices are zero."]
        if checked := done.notes.get("checked"):
            lines += ["", "## onnxruntime-genai against PyTorch", ""]
            lines += _table([("", "largest difference of a logit", "greedy tokens the same")] + [
                (name, f"{found['logits_off']:.2g}", str(found["greedy_same"])) for name, found in checked.items()
            ])  # fmt: skip
        if kept := done.notes.get("kept"):
            lines += [
                "",
                "Layers that kept more bits: " + ", ".join(f"{layer} {level}" for layer, level in kept.items()) + ".",
            ]
        if (rewritten := done.notes.get("adapters")) and isinstance(rewritten, dict):
            lines += ["", "Adapters: " + "; ".join(f"{name} {what}" for name, what in rewritten.items()) + "."]
    if effects := scores.get("adapters"):
        lines += ["", "## Adapters on the new base, against the same on the old", ""]
        lines += _table([("adapter", "KL", "effect, KL to base", "cosine of the effect", "top-1")] + [
            (name, f"{e['kl']:.4f}", f"{e['kl_to_base']:.4f}", f"{e['cosine']:.3f}", f"{e['top1']:.1%}")
            for name, e in effects.items()
        ])  # fmt: skip
    if spoken := scores.get("engine", {}).get("adapters"):
        lines += ["", "## Adapters in vLLM", ""]
        for name, answers in spoken["answers"].items():
            lines += [f"- {name}, {prompt!r}: {' '.join(said.split())}" for prompt, said in answers.items()]
    if samples := scores.get("samples"):
        lines += ["", "## Answers", ""]
        for sample in samples:
            lines += [f"**{sample['prompt']}**", ""]
            lines += [
                f"- {name}: {' '.join(str(said).split())}" for name, said in sample.items() if name != "prompt"
            ] + [""]
    return "\n".join(lines) + "\n"


def _found(kind: str, options: dict[str, Any], notes: dict[str, Any]) -> str:
    """What a step has to say for itself, in a sentence."""
    if kind == "combine":
        return (
            f"{options['name']}: {notes['means']}. Rank {notes['rank']}, "
            f"{notes['error']:.2%} off the exact weighted sum of the updates."
        )
    if kind == "merge":
        return (
            f"Merged: logits at most {notes['logits_off']:g} from base + adapters in fp32, KL "
            f"{notes['kl_to_base_plus_adapter']:g}; weights at most {notes['weights_off_in_last_places']:g} of bf16's "
            "last place from the exact ones (rounding to the nearest is 0.5)."
        )
    if kind == "prune" and notes.get("dropped"):
        return f"Dropped: layers {', '.join(map(str, notes['dropped']))}."
    if kind == "heal":
        squares = f", after least squares {notes['repair']['left']:.3f}" if "repair" in notes else ""
        return (
            f"Log-perplexity above the original's: {notes['lost']:.3f} after pruning{squares}, {notes['left']:.3f} "
            f"in the end, after {notes['trained_tokens']:,} tokens of distillation."
        )
    if kind == "onnx":
        return (
            f"Logits at most {notes['logits_off']:g} from PyTorch's in fp32; the first {notes['greedy_same']} of 64 "
            "greedy tokens, through the cache, are the same."
        )
    return ""


def _judged(verdict: Verdict) -> tuple[str, ...]:
    measured = "-" if verdict.measured is None else f"{verdict.measured:.4g}"
    return verdict.bound, f"{verdict.limit:g}", measured, "yes" if verdict.holds else "**no**"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    first, *rest = rows
    return [f"| {' | '.join(first)} |", "|" + "---|" * len(first)] + [f"| {' | '.join(row)} |" for row in rest]


def _plots(folder: Path, facts: Facts) -> list[tuple[str, str]]:
    """(file, title) of each plot that there is something for."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "loradock"
    from matplotlib import pyplot

    made = []
    scores = facts.scores

    def save(figure: Any, file: str, title: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / file, metadata={"Date": None})
        pyplot.close(figure)
        made.append((file, title))

    if "perplexity" in scores:
        speed = scores.get("speed_1")
        figure, axes = pyplot.subplots(1, 2 if speed else 1, figsize=(8 if speed else 4.5, 3.2), squeeze=False)
        pairs = [("weights, MB", scores["bytes_original"] / 1e6, scores["bytes"] / 1e6)]
        if speed:
            old, new = scores["engine"]["original"], scores["engine"]["result"]
            pairs.append(("tokens/s at 1 stream", old["tokens_per_second"]["1"], new["tokens_per_second"]["1"]))
        for axis, (label, before, after) in zip(axes[0], pairs, strict=True):
            axis.scatter([before], [scores["perplexity_original"]], label="original", color="tab:gray")
            axis.scatter([after], [scores["perplexity"]], label="result", color="tab:blue")
            axis.set_xlabel(label)
            axis.set_ylabel("perplexity")
            axis.grid(alpha=0.3)
            axis.legend()
        save(figure, "quality.svg", "Quality against size and speed")
    for done in facts.done:
        if sensitivity := done.notes.get("sensitivity"):
            figure, axis = pyplot.subplots(figsize=(8, 3.2))
            levels = list(next(iter(sensitivity.values())))
            for level in levels:
                axis.plot([found[level] for found in sensitivity.values()], ".-", label=f"{level} alone", linewidth=0.8)
            marks = [at for at, label in enumerate(sensitivity) if label in done.notes.get("kept", {})]
            axis.scatter(
                marks,
                [sensitivity[list(sensitivity)[at]][levels[0]] for at in marks],
                color="tab:red",
                zorder=3,
                label="kept more bits",
            )
            every = max(1, len(sensitivity) // 30)
            axis.set_xticks(range(0, len(sensitivity), every), list(sensitivity)[::every], rotation=90, fontsize=6)
            axis.set_yscale("log")
            axis.set_ylabel("KL, nats a token")
            axis.legend()
            save(figure, "sensitivity.svg", "What rounding each unit alone costs")
        if influence := done.notes.get("influence"):
            figure, axis = pyplot.subplots(figsize=(8, 2.8))
            colors = ["tab:red" if at in done.notes["dropped"] else "tab:blue" for at in range(len(influence))]
            axis.bar(range(len(influence)), influence, color=colors)
            axis.set_xlabel("layer (red: dropped)")
            axis.set_ylabel("block influence")
            save(figure, "influence.svg", "Block influence of each layer")
        if losses := done.notes.get("losses"):
            figure, axis = pyplot.subplots(figsize=(8, 2.8))
            axis.plot(losses)
            axis.set_ylabel("KL to the original")
            axis.set_xlabel("share of the steps")
            save(figure, "healing.svg", "Healing")
    return made


def _page(facts: Facts, told: str, folder: Path, plots: list[tuple[str, str]]) -> str:
    """The same as a page that needs nothing beside it."""
    body: list[str] = []
    rows: list[str] = []
    for line in [*told.splitlines(), ""]:
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
        drawn = (folder / file).read_text()
        body.append(f"<h2>{html.escape(title)}</h2>" + drawn[drawn.index("<svg") :])
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
