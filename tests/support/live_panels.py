"""Every panel of every dashboard against known traffic: a server over the known engine, and Prometheus over that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from serve.config import keys_hashed, load
from serve.engine.payer import Cause, Work
from serve.rollout.canary.canary_monitor import LOWEST_LOG_EVIDENCE as LOWEST
from serve.rollout.policy import DEFAULT_POLICIES
from serve.telemetry.rendered.dashboards import dashboards
from serve.telemetry.slo import DEFAULT_SLOS
from tests.support import tiny
from tests.support.known_backend import KnownBackend
from tests.support.mixed_traffic import GUARDS, MixedTraffic
from tests.support.panel_values import PANELS, PRICE, World, wrong
from tests.support.prometheus import ask, await_scrapes, filled, prometheus
from tests.support.served import Served
from tests.support.server import done
from tests.support.waiting import eventually

ADMIN = "an-admin-key"
# Seconds that a request may wait for its turn: some of a crowd of forty are refused.
MAX_WAIT = 0.2


# What the server asks by itself: nobody knows how much that is.
UNSENT = (Cause.PROBE, Cause.SHADOW, Cause.GOLDEN, Cause.JUDGE)


def _count_what_was_sent(served: Served) -> None:
    """Usage shows what clients sent, and what was asked in their name."""
    for base in served.app.state.parts.fleet:
        count = partial(_count, base.engine._on_work)
        base.engine._on_work, base._engine_of = count, partial(base._engine_of, on_work=count)


def _count(count: Callable[[Work], None], work: Work) -> None:
    if work.payer.cause not in UNSENT:
        count(work)


class LivePanels:
    """Plays the traffic for `seconds` at least, once through in any case; `problems` compares what panels show.

    `window` is how many seconds Grafana's rates go over: all of the traffic must be within.
    """

    def __init__(self, served: Served, traffic: MixedTraffic, client: httpx.Client, window: float) -> None:
        self._served, self.traffic, self._client, self._window = served, traffic, client, window
        self._waiting: dict[tuple[str, str], int] = {}
        self._held_at = self._held_up = self._swapped_at = 0.0

    def play(self, seconds: float = 0.0) -> None:
        """All of the traffic; the queue is held up at the end."""
        await_scrapes(self._client)
        self.traffic.restart_engine()
        end = time.monotonic() + seconds
        while True:
            self.traffic.play(lambda: await_scrapes(self._client, 2))
            self._swapped_at = await_scrapes(self._client, 2)
            if time.monotonic() >= end:
                break
        self.traffic.hold_up(self._look)

    def problems(self) -> list[str]:
        """What a panel does not show, or not as it was sent."""
        at, firing = self._settled()
        world = self._world(firing)
        lines = []
        for board in dashboards(DEFAULT_SLOS):
            uid, panels = board["uid"], [panel for panel in board["panels"] if panel["type"] != "row"]
            lines += [f"{uid}: {title} is no panel" for title in PANELS[uid].keys() - {p["title"] for p in panels}]
            for panel in panels:
                # The Swap dashboard shows one adapter.
                choices = self._choices(adapter="calm") if uid == "loradock-swap" else self._choices()
                problems = self._panel(panel, PANELS[uid], world, at, choices)
                lines += [f"{uid}: {panel['title']}: {line}" for line in problems]
            for annotation in board["annotations"]["list"]:
                expr = filled(annotation["expr"], self._choices())
                if not ask(self._client, expr, self._swapped_at):
                    lines.append(f"{uid}: the annotation {annotation['name']} marks nothing")
        return lines

    def _look(self, waiting: dict[tuple[str, str], int]) -> None:
        began = time.time()
        self._waiting, self._held_at = waiting, await_scrapes(self._client)
        # A scrape may get what was rendered a second before.
        self._held_up = max(0.0, self._held_at - began - 1)

    def _panel(
        self, panel: dict[str, Any], expected: dict[str, Any], world: World, at: float, choices: dict[str, str]
    ) -> Iterator[str]:
        if panel["title"] not in expected:
            yield "has no entry in tests/support/panel_values.py"
            return
        shown = expected[panel["title"]](world)
        if len(shown) != len(panel["targets"]):
            yield f"has {len(panel['targets'])} queries, and an entry for {len(shown)}"
            return
        empty = True
        for target, shows in zip(panel["targets"], shown, strict=True):
            expr = filled(target["expr"], choices | shows.choices)
            samples = ask(self._client, expr, self._held_at if shows.held else at)
            empty = empty and not samples and not shows.absent
            yield from (f"{line} ({expr})" for line in wrong(shows, samples))
        if empty:
            yield "returns nothing"

    def _choices(self, **choices: str) -> dict[str, str]:
        every = {
            "adapter": ".*",
            "version": ".*",
            "tenant": ".*",
            "model": ".*",
            "__rate_interval": f"{self._window:g}s",
        }
        return every | {"old": "v1", "new": "v2"} | choices

    def _settled(self) -> tuple[float, list[dict[str, str]]]:
        """A time after all traffic at which no alert changes, and those that fire then."""
        while True:
            before = self._firing()
            at = await_scrapes(self._client)
            after = self._firing()
            if before == after:
                return at, after

    def _firing(self) -> list[dict[str, str]]:
        alerts = self._client.get("/api/v1/alerts").json()["data"]["alerts"]
        return sorted((alert["labels"] for alert in alerts if alert["state"] == "firing"), key=str)

    def _world(self, firing: list[dict[str, str]]) -> World:
        parts, http = self._served.app.state.parts, self._served.http
        drift: dict[tuple[str, ...], dict[str, float]] = {}
        effects: dict[tuple[str, ...], float] = {}
        for name in (*parts.registry.names(), "base"):
            for version in done(http.get(f"/v1/adapters/{name}/drift"))["versions"]:
                labels = (name, version["version"])
                for signal, numbers in version["signals"].items():
                    drift[*labels, signal] = numbers
                    effects |= {(*labels, signal, stat): value for stat, value in numbers["effects"].items()}
                if "probe" in version:
                    effects[*labels, "probe", "noise_ratio"] = version["probe"]["noise_ratio"]
        states = parts.fleet.first.engine.states
        where = {(a.name, f"v{a.version}"): states.get(a.id, "disk") for a in parts.registry.adapters()}
        analysis = parts.canary_monitor.analysis("calm")
        canary = {("v2", group): max(evidence, LOWEST) for group, evidence in analysis.evidence().items()}
        forecast = analysis.comparison.to_proof()
        bounds = {bound: getattr(forecast, bound) for bound in ("low", "expected", "high")} if forecast else {}
        to_proof = {("v2", bound): value for bound, value in bounds.items() if value < math.inf}
        return World(
            self.traffic, self._waiting, self._held_up, self._window, firing, drift, effects, canary,
            analysis.comparison.log_threshold, to_proof, where,
            http.get("/metrics").text, self.traffic.golden, done(http.get("/v1/adapters/echo/golden"))["digest"],
            done(http.get("/v1/adapters/echo/drift"))["shadow"],
            [file["bytes"] for file in done(http.get("/v1/files", params={"limit": 1000}))["data"]],
        )  # fmt: skip


@contextmanager
def live_panels(folder: Path, window: float = 600.0, *, every: str | None = "1s") -> Iterator[LivePanels]:
    """Server and Prometheus; `every` replaces the intervals in which it scrapes and evaluates."""
    model = tiny.model(_made(folder / "model"))
    table = torch.randn(tiny.VOCABULARY, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    save_file({"model.embed_tokens.weight": table}, model / "model.safetensors")
    config = load([str(model), "--name", "base", "--data-dir", str(folder / "data")], {})
    keys = keys_hashed([ADMIN])
    config = replace(
        config, admin_keys=keys, max_wait=MAX_WAIT, drift_reference=30, drift_threshold=1e4, prices=(PRICE,),
        policies=(*DEFAULT_POLICIES, *GUARDS),
    )  # fmt: skip
    backend = KnownBackend(str(model))
    with ExitStack() as open:
        server = Served(config, backend, ADMIN)
        _count_what_was_sent(server)
        served = open.enter_context(server)
        client = open.enter_context(prometheus(_made(folder / "monitoring"), served.port, ADMIN, every=every))
        assert eventually(lambda: ask(client, 'up{job="loradock"} == 1'))
        traffic = MixedTraffic(served, backend, lambda seed: tiny.adapter(folder / f"adapter-{seed}", seed))
        open.callback(traffic.close)
        yield LivePanels(served, traffic, client, window)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
