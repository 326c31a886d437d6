"""What a request says, as numbers: right, stable and cheap."""

from __future__ import annotations

import numpy as np
import pytest

from serve.asgi.exchange import Generation
from serve.drift.features.embedding import Embedding
from serve.drift.features.features import (
    CLIP,
    LOGPROB,
    OUTPUT,
    PROMPT,
    Scale,
    answer_rows,
    columns,
    names,
    prompt_row,
)
from serve.drift.features.token_surprise import SKETCH
from serve.models.refusals import refuses


@pytest.fixture
def embedding():
    return Embedding.project(np.random.default_rng(0).standard_normal((500, 48)).astype(np.float32))


def test_rows_have_the_scores_that_their_names_say(embedding):
    prompt = prompt_row(embedding, [5, 6, 7])
    assert prompt.shape == (columns(PROMPT, 32) + SKETCH + embedding.narrow.shape[1],)
    assert prompt[0] == pytest.approx(np.log(4)) and names(PROMPT) == ("length",)
    assert np.array_equal(prompt[1:33], embedding.vector([5, 6, 7]))
    rows = answer_rows(
        embedding, Generation([], [9, 9, 9, 8], "length", "I cannot help with that.", logprobs=[-1, -2, -3, -2])
    )
    assert rows[OUTPUT].shape == (columns(OUTPUT, 32) + SKETCH + embedding.narrow.shape[1],)
    output = dict(zip(names(OUTPUT), rows[OUTPUT][:5], strict=True))
    assert (output["ended_by_length"], output["refusal"]) == (1, 1)
    assert output["distinct_1"] == 0.5 and output["distinct_2"] == pytest.approx(2 / 3)
    assert rows[LOGPROB][:3] == pytest.approx([-2, -3, np.std([-1, -2, -3, -2])])
    assert set(answer_rows(embedding, Generation([], [9], "stop"))) == {OUTPUT}
    assert answer_rows(embedding, Generation([], [], "stop")) == {}


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


def test_a_scale_explains_the_mean_logprob_away():
    rng = np.random.default_rng(1)
    length, vector = rng.standard_normal((4000, 1)), rng.standard_normal((4000, 9))
    mean = vector @ np.linspace(-1, 1, 9) + 0.5 * length[:, 0] + 0.1 * rng.standard_normal(4000)
    raw = np.column_stack((mean, mean - 1, np.ones(4000), length, vector))
    residual = Scale.fit(LOGPROB, raw[::2])(raw[1::2])[:, 0]
    assert residual.std() == pytest.approx(1, abs=0.1)
    assert abs(np.corrcoef(residual, mean[1::2])[0, 1]) < 0.2


def test_few_log_probabilities_that_no_prompt_explains_are_explained_by_none():
    """45 rows and 34 numbers: the regression that fits them best is noise, and spreads later ones by more than half."""
    rng = np.random.default_rng(5)
    raw = rng.standard_normal((1000, 37))
    scale = Scale.fit(LOGPROB, raw[:45])
    onto = scale.matrix[:, 0] / scale.matrix[0, 0]
    assert (raw[45:] @ onto).std() < 1.15


def test_of_a_prompt_length_and_surprises_are_scores_and_its_vector_is_none():
    raw = np.random.default_rng(3).standard_normal((400, 12)) * 3 + 1
    scale = Scale.fit(PROMPT, raw, surprises=2)
    scores = scale(raw[7])
    assert scores.shape == (3,) and np.allclose(scores[-2:], np.clip(raw[7, -2:], -CLIP, CLIP), atol=1e-6)
    assert scores[0] == pytest.approx((raw[7, 0] - raw[:, 0].mean()) / raw[:, 0].std(), abs=1e-4)


def test_a_constant_stays_one_and_an_odd_row_is_clipped():
    raw = np.random.default_rng(2).standard_normal((100, 5))
    raw[:, 1] = 1
    scale = Scale.fit(OUTPUT, raw)
    again = Scale.from_arrays(scale.arrays())
    row = raw[0].astype(np.float32)
    assert scale(row)[1] == 0
    assert np.array_equal(scale(row), again(row))
    assert np.abs(scale(row * 1e6)).max() == CLIP
