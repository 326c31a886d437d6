"""Eight trained adapters into one adapter by each method, and into the base: what each then answers on a real server.

    python -m tests.campaigns.eight [FOLDER]

The first adapter has the weight 1 and the others 0.1, so that the exact weighted sum answers as the first one does.
Prints each method's error against that sum, and on how many prompts, none of which an adapter was trained on, its
answer is the first one's word and nothing else. FOLDER keeps what was made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.lora import UNSEEN, trained
from tests.support.server import ROOT, SMALL, Server, done, loradock

WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel")
WEIGHTS = [1.0] + [0.1] * 7
METHODS = {"cat": 0, "svd": 32, "linear": 0, "ties": 32, "dare_linear": 32, "dare_ties": 32, "magnitude_prune": 32}


def optimized(folder: Path, name: str, adapters: dict[str, Path], step: dict[str, Any], form: str) -> dict[str, Any]:
    """What the step says of itself; the export is in `folder / name`."""
    recipe = {
        "model": "smollm2",
        "adapters": {word: str(path) for word, path in adapters.items()},
        "steps": [step],
        "evaluate": {"samples": 1, "tokens": 128, "engine": False, "prompts": ["Hello"]},
        "export": {"format": form},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "serve.cli", "optimize", str(file), "--out", str(folder / name), "--resume"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    notes: dict[str, Any] = json.loads((folder / name / "manifest.json").read_text())["steps"][0]["notes"]
    return notes


def answered(server: Server, model: str) -> tuple[int, str]:
    """How many of the unseen prompts it answers with the first word alone, and one of its answers."""
    right, answers = 0, []
    for prompt in UNSEEN:
        request: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0}
        if isinstance(prompt, str):
            reply = done(server.http.post("/v1/completions", json=request | {"prompt": prompt}))
            text = reply["choices"][0]["text"]
        else:
            reply = done(server.http.post("/v1/chat/completions", json=request | {"messages": prompt}))
            text = reply["choices"][0]["message"]["content"]
        answers.append(text)
        right += bool(text.strip()) and set(text.split()[:-1]) == {WORDS[0]}
    return right, answers[0]


def main(folder: Path) -> None:
    adapters, weighted = trained(*WORDS), {"adapters": list(WORDS), "weights": WEIGHTS}
    for method, rank in METHODS.items():
        step = {"combine": {"name": method, "method": method, "rank": rank, **weighted}}
        notes = optimized(folder, method, adapters, step, "adapter")
        print(f"{method}: rank {notes['rank']}, off by {notes['error']:.2%}", flush=True)
    merged = optimized(folder, "merged", adapters, {"merge": weighted}, "vllm")
    print(f"merged into the base: {merged}", flush=True)
    flags = ("--max-lora-rank", "64", *SMALL)
    with Server(folder / "data", folder / "log", *flags) as server:
        for method in METHODS:
            pushed = loradock("adapters", "push", method, folder / method, LORADOCK_URL=server.url)
            assert pushed.returncode == 0, pushed.stderr
            right, answer = answered(server, method)
            print(f"{method} answers {right} of {len(UNSEEN)} as {WORDS[0]} does: {answer!r}", flush=True)
    with Server(folder / "data2", folder / "log2", *SMALL, model=str(folder / "merged")) as server:
        (name,) = (row["id"] for row in done(server.http.get("/v1/models"))["data"])
        right, answer = answered(server, name)
        print(f"the merged base answers {right} of {len(UNSEEN)} as {WORDS[0]} does: {answer!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
