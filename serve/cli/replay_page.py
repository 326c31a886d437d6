"""What `loradock adapters replay` prints."""

from __future__ import annotations

from typing import Any

# What two answers are compared by, as people say it.
_MEASURES = (
    ("exact", "word for word the same"),
    ("prefix", "the same from the beginning, as a part"),
    ("edit", "the same but for edits, as a part"),
    ("length", "as long as the other, times"),
)


def replayed(answer: dict[str, Any]) -> str:
    """How far the two agree, what is known of ratings, and the answers that differ most."""
    other = "the kept answers" if answer["against"] == "kept" else "the live version's answers"
    lines = [f"{answer['name']}@v{answer['version']} answered {answer['requests']} requests; against {other}:"]
    for name, words in _MEASURES:
        if (value := answer["agreement"][name]) is not None:
            lines.append(f"  {value:.2f}  {words}")
    if (refusals := answer.get("refusals", {})).get("candidate") is not None:
        lines.append(f"  {refusals['candidate']:.2f}  refusals, and {refusals['other']:.2f} of the others")
    if (judge := answer["judge"])["requests"]:
        lines.append(f"a judge gives {judge['candidate']:.2f}, and {judge['other']:.2f} to the others")
    if (ratings := answer["ratings"])["rated"]:
        lines.append(f"people gave {ratings['given']:.2f} to {ratings['rated']} answers; {_bounds(ratings)}")
    lines += [f"{count} not answered: {why}" for why, count in answer["refused"].items()]
    for example in answer["examples"]:
        lines += ["", f"--- {example['request_id']}, {example['version']}", _block("asked", example["asked"])]
        lines += [_block("other", example["other"]), _block("this", example["candidate"])]
        lines += [_block("should be", example["correction"])] if example["correction"] else []
    return "\n".join(lines)


def _bounds(ratings: dict[str, Any]) -> str:
    return (
        f"{ratings['known']} of this version's they know: its mean is {ratings['low']:.2f} if all others are bad, and "
        f"{ratings['high']:.2f} if all are good"
    )


def _block(title: str, text: str) -> str:
    return "\n".join(f"{title if at == 0 else '':>10} | {line}" for at, line in enumerate(text.splitlines() or [""]))
