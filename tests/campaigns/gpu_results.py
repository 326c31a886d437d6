"""What the parts of a campaign found, each in a file of its own as soon as it has ended: a GPU may be lent for minutes.

FOLDER/PART.json    seconds, the machine, and the rows of one part; it is not measured again
FOLDER/table.md     all of them, as the docs have it: the report that is sent back
"""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Part = Callable[[], Mapping[str, str]]


# Of a part: a machine that is lent for ten minutes at a time gives at least one result each time.
LONGEST = 300


def run(
    parts: Mapping[str, Part], chosen: Sequence[str], out: Path, machine: str, command: str, longest: float = LONGEST
) -> int:
    """Measure what was not; how many parts failed, or 2 where the folder belongs to another machine.

    longest: seconds after which a part is given up (0: never), so that the others have their turn.
    """
    out.mkdir(parents=True, exist_ok=True)
    if others := [found["machine"] for found in measured(parts, out).values() if found["machine"] != machine]:
        print(f"{out} holds what was measured on another machine or model ({others[0]}): say another --out")
        return 2
    failed = []
    for name in chosen or list(parts):
        file = out / f"{name}.json"
        if file.is_file():
            print(f"{name}: measured before", flush=True)
            continue
        began = time.monotonic()
        try:
            with given_up_after(longest):
                found = parts[name]()
        except Exception:  # the others are worth their time all the same
            traceback.print_exc()
            failed.append(name)
            continue
        seconds = round(time.monotonic() - began)
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps({"seconds": seconds, "machine": machine, "rows": found}, indent=1))
        aside.rename(file)
        print(f"{name}: {seconds} s", flush=True)
        (out / "table.md").write_text(table(parts, out, machine, command))
    print(table(parts, out, machine, command))
    if failed:
        print(f"not measured: {', '.join(failed)}; run it again", file=sys.stderr)
    return len(failed)


@contextmanager
def given_up_after(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after so many seconds; what it has opened closes behind it."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not ended within {seconds:g} s: run it again, or give it longer with --part-seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(parts: Mapping[str, Any], out: Path) -> dict[str, dict[str, Any]]:
    """What each part that has ended found, by its name."""
    files = {name: out / f"{name}.json" for name in parts}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def table(parts: Mapping[str, Any], out: Path, machine: str, command: str) -> str:
    """What all parts found so far, as the docs have it."""
    ended = measured(parts, out)
    head = f"{machine}, {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}. `{command}`."
    lines = [head, "", "| | found |", "|---|---|"]
    for name in parts:
        rows = ended[name]["rows"] if name in ended else {name: "not measured"}
        lines += [f"| {what} | {value} |" for what, value in rows.items()]
    return "\n".join(lines) + "\n"


def texts(folder: Path) -> tuple[Path, Path]:
    """For calibration and for measuring: the docs of this repository, page by page in turn, no line in both."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    seen = {" ".join(line.lower().split()) for page in pages[::2] for line in page.splitlines()}
    others = [
        [line for line in page.splitlines() if " ".join(line.lower().split()) not in seen] for page in pages[1::2]
    ]
    made = folder / "calibration.jsonl", folder / "evaluation.jsonl"
    for file, own in zip(made, (pages[::2], ["\n".join(lines) for lines in others]), strict=True):
        file.write_text("".join(json.dumps({"text": page}) + "\n" for page in own))
    return made
