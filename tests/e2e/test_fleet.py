"""The real engine dies, hangs, and gives its place to another; the server stays, and no answer is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.crowd import ADAPTERS, STREAMS, Crowd, descriptors, engines, p99, residents, row, stock, word
from tests.support.server import BASE, SMALL, Server, alive, done
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def fleet(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with 16 adapters, one of them pinned, that notices a hang after 10 s."""
    folder = tmp_path_factory.mktemp("fleet")
    with Server(folder / "data", folder / "log", "--hang-timeout", "10", "--restart-wait", "120", *SMALL) as server:
        stock(server, adapters, folder)
        yield server


def test_a_killed_engine_comes_back_with_its_adapters_and_the_server_never_falters(fleet):
    assert row(fleet)["restarts"] == 0
    open_before = descriptors(fleet)
    with Crowd(fleet) as crowd:
        crowd.whole(4)
        victims = engines(fleet)
        killed = time.monotonic()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        # A third of a second where there is room; a machine with ten times too much to do has taken ten.
        assert eventually(lambda: fleet.http.get("/ready").status_code == 503), "nobody noticed"
        noticed = time.monotonic() - killed
        assert fleet.http.get("/health").status_code == 200
        assert row(fleet)["phase"] in ("restarting", "ready"), "an operator wants to see it just then"
        assert eventually(lambda: fleet.http.get("/ready").status_code == 200, 120)
        back = time.monotonic() - killed
        after = row(fleet)
        assert len(residents(fleet)) == ADAPTERS, "it was ready before its adapters were there"
        assert after["restarts"] == 1
        crowd.whole(STREAMS)
    # Those under way, and on a busy machine some that were sent before anybody noticed.
    assert len(crowd.broken) <= 2 * STREAMS, crowd.broken
    assert all("503" in end.said and end.at - killed < noticed + 5 for end in crowd.broken), crowd.broken
    assert not alive(victims)
    print(f"noticed after {noticed:.2f} s, ready after {back:.1f} s; first start {fleet.seconds_to_ready:.1f} s")
    assert eventually(lambda: descriptors(fleet) <= open_before + 4), f"{descriptors(fleet)}, {open_before} before"


@pytest.mark.skipif(
    "LORADOCK_TEST_FLEET" not in os.environ,
    reason="two engines on two cores take minutes (make chaos)",
)
def test_a_swap_of_the_base_there_and_back_fails_nothing(fleet, tmp_path):
    first = row(fleet)["model"]
    # An export of `loradock optimize`, if one is named; else something close to the base.
    export = os.environ.get("LORADOCK_TEST_EXPORT")
    other = Path(export) if export else perturbed(Path(first), tmp_path / "perturbed")
    with Crowd(fleet) as crowd:
        crowd.whole(2 * STREAMS)
        quiet = crowd.ends[:]
        for model in (other, Path(first)):
            old, began = engines(fleet), time.monotonic()
            told = fleet.http.post(f"/v1/engines/{BASE}/swap", json={"model": str(model)}, timeout=600)
            if export and told.status_code == 409 and model == other:
                print(f"refused, so it is forced: {told.json()['error']['message'][:300]}")
                forced = {"model": str(model), "force": True}
                told = fleet.http.post(f"/v1/engines/{BASE}/swap", json=forced, timeout=600)
            told = done(told)
            assert len(told["adapters"]) == ADAPTERS
            assert export or all(one["lost"] < 0.2 for one in told["adapters"]), told
            assert (told["model"], told["phase"]) == (str(model), "ready")
            crowd.whole(STREAMS, 300)
            assert eventually(lambda old=old: not alive(old)), "the old engine's memory was not freed"
            during = [end for end in crowd.ends if began < end.at]
            worst = max(one["lost"] for one in told["adapters"])
            print(
                f"swapped in {told['seconds']} s, p99 between tokens {p99(during) * 1000:.0f} ms, "
                f"{p99(quiet) * 1000:.0f} ms before, {len(during)} answers, largest change of an effect {worst:.3f}"
            )
    assert not crowd.broken, crowd.broken
    assert len(residents(fleet)) == ADAPTERS


def test_an_engine_that_hangs_is_replaced_and_who_waited_is_told(fleet):
    before = row(fleet)
    victims = engines(fleet)
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    told = fleet.http.post("/v1/completions", json={"model": "a1", "prompt": "x", "max_tokens": 4})
    assert told.status_code == 503
    assert "no step" in told.json()["error"]["message"]
    assert int(told.headers["retry-after"]) >= 1
    # `hang_timeout` is 10 s; its last step may have been a moment before it was stopped.
    assert 9 <= time.monotonic() - began < 30
    assert eventually(lambda: fleet.http.get("/ready").status_code == 200, 120)
    assert fleet.ask("a1").word == word(1)
    assert not alive(victims)
    assert row(fleet)["restarts"] == before["restarts"] + 1
    assert fleet.ask(BASE).done


def perturbed(model: Path, out: Path) -> Path:
    """The same checkpoint with every matrix moved by a thousandth of its size."""
    shutil.copytree(model, out)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=draw) * tensor.float().std() * 1e-3
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, file, {"format": "pt"})
    return out
