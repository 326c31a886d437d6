"""The report of a run in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimize.pipeline.facts import Done, Facts
from optimize.pipeline.gate import Verdict
from optimize.steps.kind import kinds

Row = tuple[str, ...]


def to_markdown(facts: Facts) -> str:
    scores = facts.scores
    lines = [
        f"# {facts.name}",
        "",
        f"From {facts.plan.model.name}. Gate: {facts.verdict}.",
        "",
        *_table(_quality(scores, facts.original)),
    ]
    if tasks := scores.get("tasks"):
        lines += _section("Tasks", _table(_tasks(tasks)))
    if facts.verdicts:
        header = ("bound", "limit", "measured", "holds")
        lines += _section("Gate", _table([header, *map(_verdict, facts.verdicts)]))
    lines += _section("Steps", _table(_steps(facts.done)))
    for done in facts.done:
        lines += _of_step(done)
    if effects := scores.get("adapters"):
        lines += _section("Adapters on the new base, against the same on the old", _table(_effects(effects)))
    if adapters := scores.get("engine", {}).get("adapters"):
        lines += _section("Adapters in vLLM", _answers_of_adapters(adapters["answers"]))
    if samples := scores.get("samples"):
        lines += _section("Answers", _answers(samples))
    return "\n".join(lines) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _table(rows: Sequence[Row]) -> list[str]:
    first, *rest = rows
    return [f"| {' | '.join(first)} |", "|" + "---|" * len(first)] + [f"| {' | '.join(row)} |" for row in rest]


def _quality(scores: Mapping[str, Any], original: str) -> list[Row]:
    rows: list[Row] = [("", original, "result", "")]
    if "perplexity" in scores:
        before, after = scores["bytes_original"], scores["bytes"]
        old, new = scores["perplexity_original"], scores["perplexity"]
        rows += [
            (f"KL from {original}, nats", "0", f"{scores['kl']:.4f}", _between(scores, "kl", ".4f")),
            ("same likeliest token", "100 %", f"{scores['top1']:.1%}", _between(scores, "top1", ".1%")),
            (
                "perplexity",
                f"{old:.2f}",
                f"{new:.2f}",
                f"{scores['perplexity_increase']:+.2%}{_between(scores, 'perplexity_increase', '+.2%', ', ')}",
            ),
            ("weights, MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before:.2f}"),
        ]
    if "perplexity_base" in scores:
        base, more = scores["perplexity_base"], scores["perplexity_base_increase"]
        rows.insert(
            4, ("perplexity, against the base alone", f"{base:.2f}", f"{scores['perplexity']:.2f}", f"{more:+.2%}")
        )
    if "valid_loss" in scores:
        before, after = scores["valid_loss_before"], scores["valid_loss"]
        rows.append(("held-out loss", f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"))
    if "engine_perplexity" in scores:
        old, new = scores["engine_perplexity_original"], scores["engine_perplexity"]
        rows.append(("perplexity in vLLM", f"{old:.2f}", f"{new:.2f}", f"{scores['engine_perplexity_increase']:+.2%}"))
        if "engine_top1" in scores:
            rows.append(("same likeliest token in vLLM", "100 %", f"{scores['engine_top1']:.1%}", ""))
    if "tokens_ratio" in scores:
        rows.append(("tokens for the same text", "1", f"{scores['tokens_ratio']:.3f}", ""))
    if "engine" in scores:
        rows += _speed(scores)
    if "healed" in scores:
        rows.append(("lost log-perplexity healed", "", f"{scores['healed']:.1%}", ""))
    return rows


def _between(scores: Mapping[str, Any], name: str, form: str, before: str = "") -> str:
    """Where a score lies for all windows like these, with 95 % confidence."""
    ends = scores.get("intervals", {}).get(name)
    return f"{before}{ends[0]:{form}} to {ends[1]:{form}}" if ends else ""


def _speed(scores: Mapping[str, Any]) -> list[Row]:
    old, new = scores["engine"]["original"], scores["engine"]["result"]
    rows: list[Row] = []
    for streams in ("1", "16"):
        before, after = old["tokens_per_second"][streams], new["tokens_per_second"][streams]
        ratio = f"{scores[f'speed_{streams}']:.2f} x"
        rows.append((f"tokens/s, {streams} streams", f"{before:.1f}", f"{after:.1f}", ratio))
    rows.append(("load, s", f"{old['load_seconds']:.1f}", f"{new['load_seconds']:.1f}", ""))
    return rows


def _tasks(tasks: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = [("task", "score", "original", "result")]
    for task, scores in tasks["original"].items():
        for metric, before in scores.items():
            after = tasks["result"][task][metric]
            rows.append((task, metric.partition(",")[0], f"{before:.3f}", f"{after:.3f}"))
    return rows


def _verdict(verdict: Verdict) -> Row:
    measured = "-" if verdict.measured is None else f"{verdict.measured:.4g}"
    if verdict.low is not None:
        measured += f" ({verdict.low:.4g} to {verdict.high:.4g})"
    return verdict.bound, f"{verdict.limit:g}", measured, _holds(verdict)


def _holds(verdict: Verdict) -> str:
    return "yes" if verdict.holds else "**undecided**" if verdict.undecided else "**no**"


def _steps(steps: Sequence[Done]) -> list[Row]:
    rows: list[Row] = [("step", "options", "seconds", "CPU seconds", "memory, GB")]
    for done in steps:
        options = {name: value for name, value in done.options.items() if value not in (0, 0.0, [], ())}
        rows.append(
            (
                done.kind,
                ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in options.items()),
                f"{done.seconds:.0f}",
                f"{done.notes.get('cpu_seconds', 0):.0f}",
                f"{done.notes.get('memory', 0) / 1e9:.2f}",
            )
        )
    return rows


def _plain(value: Any) -> str:
    """An option as a recipe has it, and not as Python writes it: `tone, legal` for ("tone", "legal")."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_step(done: Done) -> list[str]:
    """What a step has to say for itself."""
    notes, lines = done.notes, []
    if sentence := _sentence(done):
        lines += ["", sentence]
    if "vocabulary_before" in notes:
        covered = f"{notes['covered']:.2%} of the calibration text's tokens stay as they were"
        lines += ["", f"Vocabulary: {notes['vocabulary']} tokens of {notes['vocabulary_before']}; {covered}."]
    if "zeros" in notes:
        lines += ["", f"{notes['zeros']:.1%} of the weights in {notes['layers']} matrices are zero."]
    if checked := notes.get("checked"):
        runtime = "onnxruntime-genai" if done.kind == "genai" else "ONNX Runtime"
        rows: list[Row] = [("", "largest difference of a logit", "greedy tokens the same")]
        rows += [(name, f"{of['logits_off']:.2g}", str(of["greedy_same"])) for name, of in checked.items()]
        lines += _section(f"{runtime} against PyTorch", _table(rows))
    if report := notes.get("validation"):
        lines += _section("Validation", _validation(report))
    if kept := notes.get("kept"):
        layers = ", ".join(f"{layer} {level}" for layer, level in kept.items())
        lines += ["", f"Layers that kept more bits: {layers}."]
    if (adapters := notes.get("adapters")) and isinstance(adapters, dict):
        lines += ["", "Adapters: " + "; ".join(f"{name} {_plain(what)}" for name, what in adapters.items()) + "."]
    return lines


def _validation(report: Mapping[str, Any]) -> list[str]:
    """What an adapter did to its base."""
    rows: list[Row] = [("check", "measured", "from", "to", "at most", "", "")]
    for check in report["checks"]:
        numbers = (f"{check[name]:.3g}" for name in ("measured", "low", "high", "limit"))
        rows.append((check["name"], *numbers, check["verdict"], check["what"]))
    lines = _table(rows) if report["checks"] else []
    lost = [f"- {each['question']} {each['says']}, not {each['answer']}" for each in report.get("lost", [])]
    problem = [f"It could not be measured: {report['problem']}"] if "problem" in report else []
    return [*lines, *([""] if lost else []), *lost, *problem]


def _sentence(done: Done) -> str:
    if kind := kinds().get(done.kind):
        return kind.sentence(done.options, done.notes)
    if done.kind == "onnx":
        return (
            f"Logits at most {done.notes['logits_off']:g} from PyTorch's in fp32; the first "
            f"{done.notes['greedy_same']} of 64 greedy tokens, through the cache, are the same."
        )
    return ""


def _effects(effects: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = [("adapter", "KL", "effect, KL to base", "cosine of the effect", "top-1", "text")]
    for name, effect in effects.items():
        kl = f"{effect['kl']:.4f}"
        moved = f"{effect['kl_to_base']:.4f}"
        cosine = f"{effect['cosine']:.3f}"
        text = "its own" if effect.get("own_text") else "the recipe's"
        rows.append((name, kl, moved, cosine, f"{effect['top1']:.1%}", text))
    return rows


def _answers_of_adapters(answers: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [
        f"- {name}, {prompt!r}: {' '.join(answer.split())}"
        for name, by_prompt in answers.items()
        for prompt, answer in by_prompt.items()
    ]


def _answers(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for sample in samples:
        answers = [f"- {name}: {' '.join(str(text).split())}" for name, text in sample.items() if name != "prompt"]
        lines += [f"**{sample['prompt']}**", "", *answers, ""]
    return lines
