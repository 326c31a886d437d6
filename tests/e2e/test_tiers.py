"""Many more adapters than the engine holds: all of them answer, and loading them over and over leaks nothing.

`make tiers` runs it with 1,000 adapters on a server of its own; the tests with a few on the one that they share.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.lora import CONFIG, WEIGHTS, write_tensors
from tests.support.server import ADMIN, BASE, KEYS, SMALL, Server, descendants, done, loradock

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]

MANY = int(os.environ.get("LORADOCK_TEST_ADAPTERS", "0"))
COUNT = MANY or 40
SLOTS, HOST = 8, 32
LAYERS, HIDDEN, HEADS_KV = 30, 576, 192


def random_adapter(folder: Path, seed: int) -> Path:
    """A small one, distinct by its seed: rank 2 to 8, all attention projections."""
    dice = np.random.default_rng(seed)
    rank = 2 + seed % 7
    outs = {"q_proj": HIDDEN, "k_proj": HEADS_KV, "v_proj": HEADS_KV, "o_proj": HIDDEN}
    tensors = {}
    for layer in range(LAYERS):
        for module, out in outs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = dice.standard_normal((rank, HIDDEN), np.float32) / 24
            tensors[f"{name}.lora_B.weight"] = dice.standard_normal((out, rank), np.float32) / 8
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(outs)}
    (folder / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": BASE}))
    return folder


@pytest.fixture(scope="module")
def crowded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not MANY:
        yield request.getfixturevalue("server")
        return
    folder = tmp_path_factory.mktemp("crowded")
    tiers = ("--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST), "--no-probe")
    with Server(folder / "data", folder / "log", *tiers, *SMALL, **KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def crowd(crowded: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The names of COUNT adapters that were pushed, each with bytes of its own."""
    folder = tmp_path_factory.mktemp("crowd")
    names = [f"crowd-{number:04d}" for number in range(COUNT)]

    def push(number: int) -> None:
        made = random_adapter(folder / str(number), number)
        done(crowded.upload(names[number], made))

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(push, range(COUNT)))
    print(f"\n{COUNT} adapters pushed in {time.monotonic() - began:.0f} s")
    yield names
    for name in names if not MANY else ():
        done(crowded.http.delete(f"/v1/adapters/{name}"))


def resident_mib(pids: set[int]) -> float:
    found = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids]
    return sum(int(one[1]) for one in found if one) / 1024


def test_a_zipf_load_over_many_more_adapters_than_the_engine_holds_has_no_error(crowded, crowd):
    requests = 1500 if MANY else 60
    ran = loradock(
        "bench", "--url", crowded.url, "--adapters", ",".join(crowd), "--adapter-mix", "zipf:1.0", "--streams", "16",
        "--requests", str(requests), "--rounds", "1", "--warmup", "0", "--reruns", "0", "--prompt-tokens", "24",
        "--max-tokens", "8", "--ignore-eos", "--json", "-",
        timeout=1500, LORADOCK_KEY=ADMIN,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (round_,) = json.loads(ran.stdout)["rounds"]
    answers = round_["answers"]
    assert len(answers) == requests and not [one for one in answers if one["error"]]
    asked = {one["model"] for one in answers}
    assert len(asked) > (HOST if MANY else SLOTS), "so few adapters prove nothing"
    assert len(crowded.engine()["resident"]) <= HOST
    waits = sorted(one["first"] - one["due"] for one in answers)
    print(
        f"{requests} requests over {len(asked)} adapters in {round_['wall_s']:.0f} s: first token after "
        f"{waits[len(waits) // 2]:.2f} s, p99 {waits[int(len(waits) * 0.99)]:.2f} s, most {waits[-1]:.2f} s"
    )


def test_loading_and_unloading_leaves_the_memory_where_it_was(crowded, crowd):
    """Each round asks adapters that were pushed out meanwhile, so each request is a load and an unload."""
    cycles, settled = (1000, 50) if MANY else (50, 25)
    family = {crowded.process.pid: "server"} | dict.fromkeys(descendants(crowded.process.pid), "engine")
    parts = {part: {pid for pid, one in family.items() if one == part} for part in ("server", "engine")}
    seen: list[dict[str, float]] = []
    done_so_far = 0
    lock = threading.Lock()

    def ask(number: int) -> None:
        nonlocal done_so_far
        body = {"model": crowd[number % COUNT], "prompt": "Once", "max_tokens": 1}
        done(crowded.http.post("/v1/completions", json=body))
        with lock:
            done_so_far += 1
            if done_so_far % settled == 0:
                seen.append({part: resident_mib(pids) for part, pids in parts.items()})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(cycles)))
    for part in parts:
        curve = [round(one[part]) for one in seen]
        print(f"\n{part}: {curve} MiB")
        assert curve[-1] <= curve[0] * 1.05, f"the {part}'s memory grew in {cycles} cycles: {curve} MiB"
