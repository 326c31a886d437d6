"""What requests ask of the sampler changes answers, and is no drift of a version."""

from __future__ import annotations

import pytest

from serve.asgi.exchange import Generation, Parameters
from serve.drift.baseline import Baseline, Phase, Provenance
from serve.drift.drift_report import version_report
from serve.drift.features.features import OUTPUT, beginning
from serve.drift.parameter_strata import COUNTED, MOST_TOKENS, STRATA, ParameterStrata, Stratum
from serve.drift.watched_version import DriftSettings, WatchedVersion
from tests.support.sampled_answers import DIMENSIONS, SampledAnswers

EIGHT = Parameters(8, 0.7)


def watched(reference=200, folder=None, **more) -> WatchedVersion:
    provenance = Provenance("tone", "1", "of a test", "", dimensions=DIMENSIONS)
    baseline = Baseline.load(folder, provenance) if folder else Baseline(provenance)
    settings = DriftSettings(threshold=1e4, interval=0, **more)
    needed = {"prompt": reference, "output": reference, "logprob": reference}
    baseline.configure(threshold=1e4, tolerance=settings.tolerance, needed=needed)
    return WatchedVersion("tone", "v1", "tone@1", "base", baseline, settings)


def ask(version, answers, count, parameters, **more) -> set[str]:
    """The signals that alarm."""
    alarms = set()
    for _ in range(count):
        alarms |= {
            alarm.signal
            for alarm in [*version.gather(answers.request(parameters, **more), answers.embedding), *version.count()]
        }
    return alarms


def test_another_max_tokens_is_no_drift():
    version, answers = watched(), SampledAnswers(1)
    for max_tokens in (8, 4, 64, 300):
        assert not ask(version, answers, 800, Parameters(max_tokens, 0.7))
    report = version_report(version, 0.0)
    assert report["parameters"]["moved"] > 0.9 and "other parameters" in report["parameters"]["note"]
    first, *_ = report["parameters"]["shares"]
    assert (first["max_tokens"], first["share_of_first"]) == ("256 to 511", 0)


def test_without_parameters_another_max_tokens_looks_like_a_broken_version():
    """Why strata are needed: the same traffic, from an engine that does not say what it was asked."""
    version, answers = watched(), SampledAnswers(1)
    assert not ask(version, answers, 600, EIGHT, told=False)
    assert "output" in ask(version, answers, 400, Parameters(4, 0.7), told=False)


@pytest.mark.parametrize(
    "parameters",
    [
        Parameters(8, 0.0),
        Parameters(8, 1.2),
        Parameters(8, 0.7, constrained=True),
        Parameters(8, 0.7, tools=True),
        Parameters(8, 0.7, others="stop"),
    ],
)
def test_other_sampling_is_no_drift_either(parameters):
    version, answers = watched(), SampledAnswers(2)
    assert not ask(version, answers, 500, EIGHT)
    assert not ask(version, answers, 500, parameters)


def test_a_broken_version_alarms_in_the_stratum_that_is_asked():
    version, answers = watched(), SampledAnswers(3)
    ask(version, answers, 300, EIGHT)
    assert not ask(version, answers, 400, Parameters(64, 0.7))
    assert "output" in ask(version, answers, 200, Parameters(64, 0.7), broken=True)
    report = version_report(version, 0.0)
    assert report["signals"]["output"]["alarmed"]
    strata = report["parameters"]["strata"]["output"]
    assert [stratum["max_tokens"] for stratum in strata] == ["64 to 127", "8 to 15"]
    assert version.since("output") is not None


def test_a_version_that_breaks_when_max_tokens_rises_is_seen_at_once():
    """Of the longer answers the beginning is compared while their own reference is gathered."""
    version, answers = watched(reference=1000), SampledAnswers(4)
    ask(version, answers, 1200, EIGHT)
    assert "output" in ask(version, answers, 300, Parameters(64, 0.7), broken=True)


def test_two_applications_with_parameters_of_their_own_are_not_compared_with_one_another():
    version, answers = watched(), SampledAnswers(5)
    for _ in range(700):
        assert not ask(version, answers, 1, EIGHT)
        assert not ask(version, answers, 1, Parameters(64, 0.7), broken=True)
    assert {signal.phase for signal in version.baseline.every(OUTPUT)} == {Phase.WATCHING}
    assert version_report(version, 0.0)["parameters"]["moved"] < 0.2


def test_strata_survive_a_restart(tmp_path):
    version, answers = watched(), SampledAnswers(6)
    ask(version, answers, 300, EIGHT)
    ask(version, answers, 300, Parameters(64, 0.7))
    version.baseline.save(tmp_path)
    again = watched(folder=tmp_path)
    assert version_report(again, 0.0)["signals"] == version_report(version, 0.0)["signals"]
    assert version_report(again, 0.0)["parameters"] == version_report(version, 0.0)["parameters"]
    assert "output" in ask(again, answers, 200, Parameters(64, 0.7), broken=True)


def test_what_an_earlier_release_kept_watches_until_there_is_a_reference_of_the_parameters():
    version, answers = watched(), SampledAnswers(8)
    assert not ask(version, answers, 400, EIGHT, told=False)
    version.baseline.strata = {kind: version.baseline._strata(kind) for kind in version.baseline.strata}
    for strata in version.baseline.strata.values():
        assert strata.restore({}) == []
    assert not ask(version, answers, 40, EIGHT)
    assert "output" in ask(version, answers, 140, EIGHT, broken=True)


def test_an_acknowledged_alarm_is_gone_in_every_stratum():
    version, answers = watched(), SampledAnswers(7)
    ask(version, answers, 300, EIGHT)
    ask(version, answers, 150, EIGHT, broken=True)
    ask(version, answers, 400, Parameters(64, 0.7), broken=True)
    version.acknowledge()
    assert not version_report(version, 0.0)["signals"]["output"]["alarmed"]


def test_memory_is_bounded_whatever_is_asked():
    class Kept:
        watching, samples, alarms = False, 0, 0

    signals = {"output": Kept()}
    strata = ParameterStrata("output", signals, Kept)
    for number in range(3000):
        strata.count(Stratum.of(Parameters(8, (number % 200) / 100, others=str(number % 7))))
    assert len(list(strata.every())) <= STRATA and len(strata.recent) <= COUNTED and len(strata.first) <= COUNTED


def test_a_stratum_that_comes_again_among_many_frequent_ones_is_counted():
    """Its earlier requests were forgotten to make room for more frequent ones; its place was not given away yet."""

    class Kept:
        watching, samples, alarms = True, 0, 0

    strata = ParameterStrata("output", {"output": Kept()}, Kept)
    shown, rare = Stratum.of(EIGHT), Stratum.of(Parameters(64, 0.7))
    for stratum in (shown, rare):
        strata.count(stratum)
    strata.recent = {Stratum.of(Parameters(8, 0.7, others=str(number))): 2.0 for number in range(COUNTED)}
    strata.count(rare)
    assert strata.recent[rare] == 1 and len(strata.recent) == COUNTED
    assert strata.current == rare and shown in strata.others


def test_what_is_asked_most_is_shown_and_what_is_rare_gives_its_place():
    class Kept:
        watching, samples, alarms = True, 100, 1

    signals = {"output": (first := Kept())}
    strata = ParameterStrata("output", signals, Kept)
    few, many = Stratum.of(EIGHT), Stratum.of(Parameters(64, 0.7))
    strata.count(few)
    for _ in range(20):
        strata.count(many)
    assert strata.current == many and strata.others == {few: first} and signals["output"] is not first
    for number in range(STRATA):
        for _ in range(10):
            strata.count(Stratum.of(Parameters(8, 1 + number / 10)))
    assert few not in strata.others and strata.signal(few) is None
    assert strata.counts() == (100 * (STRATA + 1), STRATA + 1), "what is gone has been counted"


def test_a_stratum_is_read_as_it_is_written():
    for parameters in (None, EIGHT, Parameters(1, 0), Parameters(5000, 1.3, True, True, "1f2e")):
        stratum = Stratum.of(parameters)
        assert Stratum.parse(str(stratum)) == stratum
    assert Stratum.of(Parameters(5000, 1)).tokens == MOST_TOKENS and Stratum.of(Parameters(15, 1)).tokens == 8
    assert Stratum.of(None).described() == {}


def test_the_beginning_of_an_answer_is_what_a_smaller_max_tokens_would_have_left():
    answer = Generation([], [1, 2, 3, 4], "stop", "abcdefgh", logprobs=[-1.0, -2.0, -3.0, -4.0])
    cut = beginning(answer, 2)
    assert (list(cut.output), cut.finish_reason, cut.text, list(cut.logprobs)) == ([1, 2], "length", "abcd", [-1, -2])
    for tokens in (0, 4, 8):
        assert beginning(answer, tokens) is answer
