"""The simulation of a fleet, in short: the same requests under each policy. `make fleet-sim` is the long one."""

from __future__ import annotations

import pytest

from serve.fleet.homes import order
from tests.campaigns.fleet_load import Load, Request, Trace, requests_of
from tests.campaigns.fleet_sim import POLICIES, Service, Simulation, fewest, ratios, simulate

# Of a model, not of an engine: prompts are cheap, and an adapter costs what a hundred tokens of an answer do.
SERVICE = Service(step=0.01, step_per_answer=0.001, prompt_token=0.0001, load=0.2, fetch=0.3, seats=16, resident=128)
LOAD = Load(replicas=10, adapters=1000, use=0.5, requests=4000, warm=16_000)


@pytest.fixture(scope="module")
def reports():
    return simulate(LOAD, SERVICE)


def test_homes_load_a_fifth_of_what_power_of_two_loads_and_answer_sooner(reports):
    found = ratios(reports)
    assert found["cold_to_power_of_two"] <= 0.2
    assert found["p99_to_power_of_two"] <= 0.5
    assert found["p99_to_best_other"] <= 0.9


def test_every_request_is_answered_once_under_every_policy(reports):
    assert list(reports) == list(POLICIES)
    assert {report["requests"] for report in reports.values()} == {LOAD.requests}


@pytest.mark.parametrize("events", ["diurnal", "flash crowd", "replicas die, join, slow down"])
def test_nothing_is_lost_whatever_happens(events):
    load = Load(replicas=6, adapters=200, use=0.5, requests=3000, warm=1000, events=events)
    simulation = Simulation(load, SERVICE, "homes")
    report = simulation.run()
    assert report["requests"] == len(simulation.firsts) == load.requests
    assert not simulation.open and not any(simulation.loads)


def test_a_flash_crowd_spreads_over_more_homes():
    load = Load(replicas=10, adapters=1000, use=0.5, requests=4000, warm=4000, events="flash crowd")
    simulation = Simulation(load, SERVICE, "homes")
    name, placement, most = f"adapter-{load.adapters // 2}", simulation.policy.placement, 0
    choose = simulation.policy.choose

    def watched(asked, now, loads, holders):
        nonlocal most
        most = max(most, len(placement.homes(name)))
        return choose(asked, now, loads, holders)

    simulation.policy.choose = watched
    simulation.run()
    assert most > 1


def test_adapters_that_are_read_beside_the_steps_come_one_after_another_and_wait_for_room():
    """Two fit. The third is read when an answer of one of the others has ended."""
    service = Service(
        step=0.1, step_per_answer=0.0, prompt_token=0.0, load=1.0, fetch=0.0, seats=8, resident=2, reads_beside=True
    )
    simulation = Simulation(Load(replicas=1, requests=1, warm=1), service, "power of two")
    asked = simulation.requests = [Request(0.0, name, 1, answer) for name, answer in (("a", 30), ("b", 2), ("c", 1))]
    asked += [Request(1.55, "a", 1, 1)]
    assert simulation.run()["cold"] == 3
    # a is read at once, b after it; that b has been is told when a's step ends, and b's own is the one after the next.
    # b's answer ends, c is read from the end of that step on, and told and taken up in the same way.
    assert [round(one.first, 2) for one in asked] == [1.1, 2.2, 3.5, 0.15]


def test_the_simulation_places_by_the_servers_own_code():
    simulation = Simulation(LOAD, SERVICE, "homes")
    placement = simulation.policy.placement
    assert placement.homes("adapter-7")[0] == order(placement._replicas, "adapter-7")[0]
    requests, began, end = requests_of(LOAD, SERVICE.sustained(LOAD))
    assert len(requests) == LOAD.warm + LOAD.requests and 0 < began < end == requests[-1].came


def test_a_public_trace_gives_times_and_tokens_and_adapters_are_laid_over_it(tmp_path):
    rows = [f"2023-11-16 18:15:{at % 60:02}.{at % 7}805900,{100 + at},{1 + at % 40}" for at in range(60)]
    (tmp_path / "trace.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    trace = Trace.read(tmp_path / "trace.csv")
    load = Load(replicas=2, adapters=10, use=0.5, requests=60, warm=100, trace=trace)
    sustained = SERVICE.sustained(load)
    assert load.mean == (129.5, pytest.approx(17.17, abs=0.01))
    requests, began, end = requests_of(load, sustained)
    counted = [one for one in requests if one.counts]
    assert [one.prompt for one in counted] == [100 + at for at in range(60)]
    assert (counted[10].came - counted[9].came) / (end - began) == pytest.approx(trace.gaps[10] / trace.gaps[1:].sum())
    assert {one.prompt for one in requests[:100]} <= {100 + at for at in range(60)}
    assert Simulation(load, SERVICE, "homes").run()["requests"] == 60


def test_the_fewest_replicas_meet_the_objective_and_one_less_does_not():
    load = Load(replicas=4, adapters=50, use=0.5, requests=1500, warm=1500)
    least = fewest(load, SERVICE, "homes", 0.5)
    for replicas, meets in ((least, True), (least - 1, False)):
        asked = Load(**{**vars(load), "replicas": replicas, "use": load.use * load.replicas / replicas})
        assert (Simulation(asked, SERVICE, "homes").run()["p99"] <= 0.5) is meets
