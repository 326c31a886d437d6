"""How well a prompt fits a reference is what its counts of tokens say, in nats and in its own standard deviations."""

from __future__ import annotations

import numpy as np

from serve.drift.features.shared_ends import SharedEnds
from serve.drift.features.token_surprise import SAMPLED, TokenSurprise, sketch
from serve.drift.reference_counts import MOST, Counts, ReferenceCounts
from serve.gateway.prompt_fit import WEIGHTS, PromptFit


class Text:
    special = frozenset()


def text(rng, language):
    return rng.zipf(1.4, rng.integers(4, 100)) % 500 + 500 * language


def counts(language, id=None, base="base"):
    rng = np.random.default_rng(language)
    surprise, _ = TokenSurprise.fit([sketch(text(rng, language)) for _ in range(300)])
    return Counts(f"a{language}", id or f"a{language}@1", base, surprise, Text(), SharedEnds())


def test_each_text_fits_its_own_reference_best_and_is_strange_to_the_others():
    fit, rng = PromptFit([counts(language) for language in range(3)]), np.random.default_rng(9)
    for language in range(3):
        for _ in range(50):
            nats, strangeness = fit(text(rng, language))
            assert nats.argmax() == language
            assert strangeness[language] == strangeness.min()


def test_they_are_the_logarithms_of_probabilities_and_the_scores_of_drift():
    each = [counts(language) for language in range(2)]
    fit, tokens = PromptFit(each), text(np.random.default_rng(5), 1)[:40]
    nats, strangeness = fit(tokens)
    for place, counted in enumerate(each):
        ids, known = sketch(tokens).astype(int).reshape(2, SAMPLED), 0.0
        for kind, table in enumerate(counted.surprise.tables):
            odds = np.exp(-table[:-1].astype(np.float64))
            known += np.log((odds / odds.sum())[ids[kind][ids[kind] >= 0]]).sum() * WEIGHTS[kind]
        np.testing.assert_allclose(nats[place], known, rtol=1e-3)
        np.testing.assert_allclose(strangeness[place], counted.surprise(sketch(tokens)).mean(), rtol=1e-3, atol=1e-3)


def test_what_an_adapters_prompts_begin_with_alike_is_taken_as_given():
    """Its reference has no tokens of its template, so that they would be strange to it."""
    each, rng = [counts(0), counts(1)], np.random.default_rng(5)
    template = np.arange(40) + 4000
    for _ in range(20):
        each[1].shared.split(each[1].shared.read([*template, *text(rng, 1)]))
    fit, own = PromptFit(each), text(rng, 1)
    nats, strangeness = fit([*template, *own])
    without = fit(own)
    assert nats[1] == without[0][1] and strangeness[1] == without[1][1]
    assert nats[0] < without[0][0] and strangeness[0] > without[1][0], "to others it is strange"


def test_the_mean_of_some_stands_for_all_others():
    each, rng = [counts(language) for language in range(3)], np.random.default_rng(9)
    fit = PromptFit(each)
    rest = fit.rest([0, 1, 2])
    for language in range(3):
        tokens = text(rng, language)
        nats, _ = fit(tokens)
        assert nats.min() < rest(tokens) < nats[language]
    alone = fit.rest([1])
    assert abs(alone(tokens) - fit(tokens)[0][1]) < 0.05
    assert rest([]) == 0


def test_nothing_fits_all_alike():
    nats, strangeness = PromptFit([counts(0), counts(1)])([])
    assert (nats == 0).all() and (strangeness == 0).all()


def test_the_fits_are_bounded_and_go_with_their_version_and_their_base():
    looked = []
    fits = ReferenceCounts(lambda *version: looked.append(version) or version[2] == "b@2")
    fits.find([("a", "v1", "a@1"), ("b", "v2", "b@2"), ("c", "v3", "c@3")])
    assert [id for _, _, id in looked] == ["a@1", "b@2"], "the first that is known is enough"
    assert fits.is_missing("a@1") and not fits.is_missing("a@1")
    one = counts(0)
    fits._replace({f"a@{i}": one for i in range(3)} | {"z@1": counts(1, "z@1", "other")})
    changes = fits.changes
    fits.forget("a@1")
    assert fits.of("a@1") is None and fits.of("a@2") is one and fits.changes > changes
    fits.drop("other")
    assert fits.of("z@1") is None and fits.of("a@2") is one
    assert fits.is_missing("a@1"), "another model is behind a base: all is looked for anew"
    assert MOST >= 256
