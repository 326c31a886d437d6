"""Engines that share a GPU take parts of it that add up, or are refused in a sentence."""

from __future__ import annotations

import pytest

from serve.errors import ConfigError
from serve.models.gpu_share import ENGINE, WHOLE, Wanted, shares
from serve.models.gpus import Card

GIB = 1 << 30
H100, A10, L4 = (
    Card(name, int(size * GIB), int(size * GIB)) for name, size in (("H100", 79.6), ("A10", 22.5), ("L4", 22))
)


def engine(name, size, devices=(0,), **more):
    return Wanted(name, devices, int(size * GIB), **more)


def test_alone_on_its_gpus_an_engine_takes_what_vllm_takes():
    assert shares([engine("a", 15)], [H100]) == [None]
    assert shares([engine("a", 15), engine("b", 15, (1,))], [H100, H100]) == [None, None]


@pytest.mark.parametrize("card", [H100, A10, L4])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 7), (2, 2, 2)])
def test_parts_add_up_and_each_engine_has_what_it_needs(card, sizes):
    parts = shares([engine(str(number), size) for number, size in enumerate(sizes)], [card])
    assert WHOLE - 0.01 < sum(parts) <= WHOLE
    spare = [part * card.total - size * GIB - ENGINE for part, size in zip(parts, sizes, strict=True)]
    assert min(spare) > GIB * 0.9
    assert max(spare) - min(spare) < 0.1 * GIB, "what is left is everybody's alike"


def test_what_somebody_has_set_stays_and_the_others_share_the_rest():
    assert shares([engine("a", 15, part=0.5), engine("b", 5)], [H100]) == [0.5, 0.42]
    fixed, rest = shares([engine("a", 15, kv_cache=4 * GIB), engine("b", 5)], [H100])
    assert 21 <= fixed * 79.6 < 21.1 and rest == pytest.approx(WHOLE - fixed, abs=0.002)


def test_where_nothing_is_known_of_the_card_parts_are_alike():
    assert shares([engine("a", 15), engine("b", 0)], []) == [0.46, 0.46]


def test_on_two_cards_the_one_that_is_shared_counts():
    wide, narrow = shares([engine("wide", 10, (0, 1)), engine("narrow", 10)], [H100, H100])
    assert wide == narrow == pytest.approx(0.46, abs=0.002)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            [engine("llama", 15), engine("qwen", 15)],
            r"llama, qwen share GPU 0 with 22.5 GiB.*llama 18.0 GiB, qwen 18.0",
        ),
        ([engine("a", 1, part=0.92), engine("b", 1, part=0.92)], r"adds up to 1.84: lower it.*at most 0.92"),
        ([engine("a", 1, part=0.95), engine("b", 1)], r"adds up to 0.95"),
        ([engine("a", 1, part=0.8), engine("b", 5)], r"at least b 8.0 GiB of 2.7 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(wanted, says):
    with pytest.raises(ConfigError, match=says):
        shares(wanted, [A10])
