"""The plots of a report, as SVG with the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.pipeline.facts import Facts


def drawn(folder: Path, facts: Facts) -> list[tuple[str, str]]:
    """(file, title) of each plot that there is something for."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "loradock"
    from matplotlib import pyplot

    plots: list[tuple[str, str]] = []

    def save(figure: Any, file: str, title: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / file, metadata={"Date": None})
        pyplot.close(figure)
        plots.append((file, title))

    if "perplexity" in facts.scores:
        save(_quality(pyplot, facts.scores), "quality.svg", "Quality against size and speed")
    for done in facts.done:
        if done.notes.get("sensitivity"):
            save(_sensitivity(pyplot, done.notes), "sensitivity.svg", "What rounding each unit alone costs")
        if done.notes.get("influence"):
            save(_influence(pyplot, done.notes), "influence.svg", "Block influence of each layer")
        if done.notes.get("losses"):
            tuned = done.kind == "tune"
            file, title = ("training.svg", "Training") if tuned else ("healing.svg", "Healing")
            save(_losses(pyplot, done.notes, "loss, nats" if tuned else "KL to the original"), file, title)
    return plots


def _quality(pyplot: Any, scores: Mapping[str, Any]) -> Any:
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
    return figure


def _sensitivity(pyplot: Any, notes: Mapping[str, Any]) -> Any:
    sensitivity, kept = notes["sensitivity"], notes.get("kept", {})
    figure, axis = pyplot.subplots(figsize=(8, 3.2))
    levels = list(next(iter(sensitivity.values())))
    for level in levels:
        costs = [of_unit[level] for of_unit in sensitivity.values()]
        axis.plot(costs, ".-", label=f"{level} alone", linewidth=0.8)
    marks = [at for at, label in enumerate(sensitivity) if label in kept]
    heights = [sensitivity[list(sensitivity)[at]][levels[0]] for at in marks]
    axis.scatter(marks, heights, color="tab:red", zorder=3, label="kept more bits")
    every = max(1, len(sensitivity) // 30)
    axis.set_xticks(range(0, len(sensitivity), every), list(sensitivity)[::every], rotation=90, fontsize=6)
    axis.set_yscale("log")
    axis.set_ylabel("KL, nats a token")
    axis.legend()
    return figure


def _influence(pyplot: Any, notes: Mapping[str, Any]) -> Any:
    influence = notes["influence"]
    figure, axis = pyplot.subplots(figsize=(8, 2.8))
    colors = ["tab:red" if at in notes["dropped"] else "tab:blue" for at in range(len(influence))]
    axis.bar(range(len(influence)), influence, color=colors)
    axis.set_xlabel("layer (red: dropped)")
    axis.set_ylabel("block influence")
    return figure


def _losses(pyplot: Any, notes: Mapping[str, Any], what: str) -> Any:
    figure, axis = pyplot.subplots(figsize=(8, 2.8))
    axis.plot(range(1, len(notes["losses"]) + 1), notes["losses"], label="training")
    if notes.get("valid"):
        axis.plot(*zip(*notes["valid"], strict=True), "o-", label="held out")
        axis.legend()
    axis.set_ylabel(what)
    axis.set_xlabel("step")
    return figure
