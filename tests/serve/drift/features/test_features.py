"""What a request says, as numbers: right, stable and cheap."""

from __future__ import annotations

import time

import numpy as np
import pytest

from serve.drift.features.embedding import Embedding
from serve.drift.features.features import (
    CLIP,
    LOGPROB,
    OUTPUT,
    PROMPT,
    Answer,
    Scale,
    answer_rows,
    names,
    prompt_row,
    refuses,
)
from serve.drift.features.token_surprise import SKETCH


@pytest.fixture
def embedding():
    return Embedding.project(np.random.default_rng(0).standard_normal((500, 48)).astype(np.float32))


def test_rows_have_the_scores_that_their_names_say(embedding):
    prompt = prompt_row(embedding, [5, 6, 7])
    assert prompt.shape == (len(names(PROMPT, 32)) + SKETCH + embedding.mean_width,)
    assert prompt[0] == pytest.approx(np.log(4))
    rows = answer_rows(embedding, Answer([9, 9, 9, 8], "length", "I cannot help with that.", [-1, -2, -3, -2]))
    assert rows[OUTPUT].shape == (37 + SKETCH,)
    output = dict(zip(names(OUTPUT, 32), rows[OUTPUT][:37], strict=True))
    assert (output["ended_by_length"], output["refusal"]) == (1, 1)
    assert output["distinct_1"] == 0.5 and output["distinct_2"] == pytest.approx(2 / 3)
    assert rows[LOGPROB][:3] == pytest.approx([-2, -3, np.std([-1, -2, -3, -2])])
    assert set(answer_rows(embedding, Answer([9], "stop"))) == {OUTPUT}
    assert answer_rows(embedding, Answer([])) == {}


def test_tokens_that_the_table_does_not_have_are_left_out(embedding):
    assert np.array_equal(embedding.vector([3, 4]), embedding.vector([3, 999, 4, -1]))
    assert not embedding.vector([999]).any() and not embedding.vector([]).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot answer this.", True),
        ("As an AI language model, I", True),
        ("Es tut mir leid, das geht nicht.", True),
        ("Ich kann dir dabei nicht helfen.", True),
        ("The capital of France is Paris. I cannot say more.", False),
        ("I can help you with that.", False),
        ("Sorry seems to be the hardest word is a song", False),
    ],
)
def test_refusals_are_known_by_how_they_begin(text, expected):
    assert refuses(text) is expected


def test_a_scale_whitens_its_vector_and_explains_the_mean_logprob_away():
    rng = np.random.default_rng(1)
    mixing = np.eye(8) + 0.3 * rng.standard_normal((8, 8))
    raw = np.concatenate((rng.standard_normal((4000, 1)), rng.standard_normal((4000, 8)) @ mixing), axis=1)
    scores = Scale.fit(PROMPT, raw[::2])(raw[1::2])
    assert np.abs(np.cov(scores.T) - np.eye(9)).max() < 0.2

    length, vector = rng.standard_normal((4000, 1)), rng.standard_normal((4000, 9))
    mean = vector @ np.linspace(-1, 1, 9) + 0.5 * length[:, 0] + 0.1 * rng.standard_normal(4000)
    raw = np.column_stack((mean, mean - 1, np.ones(4000), length, vector))
    residual = Scale.fit(LOGPROB, raw[::2])(raw[1::2])[:, 0]
    assert residual.std() == pytest.approx(1, abs=0.1)
    assert abs(np.corrcoef(residual, mean[1::2])[0, 1]) < 0.2


def test_scores_of_tokens_are_left_as_they_are():
    raw = np.random.default_rng(3).standard_normal((400, 12)) * 3 + 1
    scale = Scale.fit(PROMPT, raw, surprises=2)
    assert np.allclose(scale(raw[7])[-2:], np.clip(raw[7, -2:], -CLIP, CLIP), atol=1e-6)
    alone = Scale.fit(PROMPT, raw[:, :-2])
    assert np.allclose(scale(raw[7])[:-2], alone(raw[7, :-2]))


def test_a_constant_stays_one_and_an_odd_row_is_clipped():
    raw = np.random.default_rng(2).standard_normal((100, 37))
    raw[:, 1] = 1
    scale = Scale.fit(OUTPUT, raw)
    again = Scale.from_arrays(scale.arrays())
    row = raw[0].astype(np.float32)
    assert scale(row)[1] == 0
    assert np.array_equal(scale(row), again(row))
    assert np.abs(scale(row * 1e6)).max() == CLIP


def test_a_request_costs_little():
    table = np.random.default_rng(0).standard_normal((49_152, 64)).astype(np.float32)
    embedding = Embedding.project(table)
    rng = np.random.default_rng(1)
    tokens, answer = rng.integers(0, 49_000, 200), Answer(rng.integers(0, 49_000, 100), "stop", "Yes", -rng.random(100))
    times = []
    for _ in range(300):
        start = time.perf_counter()
        prompt_row(embedding, tokens), answer_rows(embedding, answer)
        times.append(time.perf_counter() - start)
    print(f"{np.median(times) * 1e6:.0f} us")
    assert np.median(times) < 1e-3  # 60 us on an idle core; ten times that is another algorithm
