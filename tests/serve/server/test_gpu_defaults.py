"""What a server on GPUs gives its engines that nobody has said."""

from __future__ import annotations

import pytest

from serve.config import Base
from serve.errors import ConfigError
from serve.models import engine_memory
from serve.models.gpu_plan import CARDS
from serve.models.gpu_share import ENGINE, LEAST_KV_CACHE, WHOLE
from serve.models.gpus import Card, cards
from serve.server.gpu_defaults import devices, with_room
from tests.support.nvml import Device, Nvml, cut

GIB = 1 << 30
A10, H100 = (Card(name, int(size * GIB), int(size * GIB), (8, 6)) for name, size in (("A10", 22.5), ("H100", 79.6)))


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """The last part of a model's name is how many GiB its weights have."""
    monkeypatch.setattr(engine_memory, "weights", lambda folder, *_: int(float(folder.name) * GIB))
    monkeypatch.setattr(engine_memory, "slots", lambda folder, adapters, rank: adapters * rank * (GIB >> 10))


def parts(*bases, cards=(H100, H100)):
    return [base.engine.get("gpu_memory_utilization") for base in with_room(bases, cards)]


def test_one_engine_is_left_as_it_is():
    base = Base("a", "m/15", {"max_loras": 4})
    assert with_room([base], [H100]) == [base]


def test_two_bases_share_the_gpu_that_they_are_both_on():
    first, second = parts(Base("a", "m/15"), Base("b", "m/5"))
    assert first > second and 0.915 <= first + second <= 0.92
    assert first * 79.6 - 15 == pytest.approx(second * 79.6 - 5, abs=0.1)


def test_parts_of_a_model_and_slots_count_where_they_are():
    wide, narrow = parts(Base("a", "m/60", {"tensor_parallel_size": 2}), Base("b", "m/30", {"max_loras": 16}))
    assert (narrow - wide) * 79.6 == pytest.approx(0.19, abs=0.1)  # their slots, and rounding
    with pytest.raises(ConfigError, match="a, b share GPU 0 with 22.5 GiB, and do not fit"):
        parts(Base("a", "m/15"), Base("b", "m/5"), cards=[A10])


def test_engines_on_gpus_of_their_own_share_nothing():
    own = {"device_ids": "1"}
    assert parts(Base("a", "m/15"), Base("b", "m/15", own)) == [None, None]
    assert parts(Base("a", "m/15", {"device_ids": ["GPU-x"]}), Base("b", "m/15")) == [None, None]


def test_what_is_said_stays():
    assert parts(Base("a", "m/15", {"gpu_memory_utilization": "0.6"}), Base("b", "m/5")) == ["0.6", 0.32]
    with pytest.raises(ConfigError, match="number above 0 up to 1, not 'half'"):
        parts(Base("a", "m/15", {"gpu_memory_utilization": "half"}), Base("b", "m/5"))


@pytest.mark.parametrize(
    ("engine", "numbers"),
    [
        ({}, (0,)),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, (0, 1, 2, 3)),
        ({"data_parallel_size": 8, "data_parallel_size_local": 2}, (0, 1)),
        ({"device_ids": [3, 1]}, (3, 1)),
        ({"device_ids": "3, 1"}, (3, 1)),
    ],
)
def test_which_gpus_an_engine_takes(engine, numbers):
    assert devices(engine) == numbers


@pytest.mark.parametrize(
    ("card", "model", "more", "slots"),
    [
        ("h100", "meta-llama/Llama-3.1-8B-Instruct", {}, 32),
        ("l4", "meta-llama/Llama-3.1-8B-Instruct", {}, None),  # the default of 8
        ("a100-40", "Qwen/Qwen3-14B", {}, None),
        ("a100-80", "Qwen/Qwen3-14B", {}, 32),
        ("a100-80", "Qwen/Qwen3-14B", {"max_lora_rank": 32}, 16),
        ("h100", "meta-llama/Llama-3.1-8B-Instruct", {"max_lora_rank": 64}, 16),
        ("a100-80", "Qwen/Qwen3-14B", {"max_lora_rank": 64}, None),
        ("h100", "Qwen/Qwen3-14B", {"max_loras": 4}, 4),
        ("h100", "somebody/unknown", {}, None),
    ],
)
def test_slots_follow_from_what_the_weights_leave_of_the_card(card, model, more, slots, monkeypatch):
    monkeypatch.setattr(engine_memory, "weights", lambda *_: 0)  # not fetched yet
    (base,) = with_room([Base("a", model, more)], [CARDS[card]])
    assert base.engine.get("max_loras") == slots


# As their drivers say it, in GiB; two of each in a machine, and of the cards in slices one slice each.
DEVICES = {
    "A10 24": lambda: Device("NVIDIA A10", 22.0, 21.7, "GPU-a", (8, 6)),
    "L4 24": lambda: Device("NVIDIA L4", 22.0, 21.8, "GPU-b", (8, 9)),
    "A100 40": lambda: Device("NVIDIA A100-SXM4-40GB", 39.4, 39.0, "GPU-c", (8, 0)),
    "A100 80": lambda: Device("NVIDIA A100-SXM4-80GB", 79.2, 78.7, "GPU-d", (8, 0)),
    "H100 80": lambda: Device("NVIDIA H100 80GB HBM3", 79.6, 78.9, "GPU-e"),
    "A100 3g.20gb": lambda: cut(Device("NVIDIA A100-SXM4-40GB", 39.4, 38.0, "GPU-f", (8, 0)), 19.6, 19.6),
    "H100 1g.10gb": lambda: cut(Device("NVIDIA H100 80GB HBM3", 79.6, 75.0, "GPU-g"), *[9.8] * 7),
}
# The engines of a server: (GiB of weights, tensor parallel, data parallel).
LAYOUTS = {
    "one": [(15, 1, 1)],
    "two bases": [(15, 1, 1), (5, 1, 1)],
    "two small bases": [(1, 1, 1), (2, 1, 1)],
    "TP 2": [(28, 2, 1)],
    "DP 2": [(15, 1, 2)],
    "TP 2 and a base on the first": [(28, 2, 1), (5, 1, 1)],
    "DP 2 and TP 2": [(5, 1, 2), (28, 2, 1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("card", DEVICES)
def test_engines_are_placed_on_cards_and_slices_so_that_each_has_its_room_or_all_are_refused(card, layout):
    in_slices = card.endswith("gb")
    number = 1 if in_slices else 2  # CUDA shows one slice to a process, and no other device beside it
    visible = cards({} if not in_slices else {"CUDA_VISIBLE_DEVICES": "MIG-0"}, Nvml([DEVICES[card]()] * number))
    bases = [
        Base(name, f"m/{weights}", {"tensor_parallel_size": wide, "data_parallel_size": ranks, "max_loras": 8})
        for name, (weights, wide, ranks) in zip("ab", LAYOUTS[layout], strict=False)
    ]
    needs = {
        base.name: int((weights * GIB + 8 * 16 * (GIB >> 10)) / wide) + ENGINE + LEAST_KV_CACHE
        for base, (weights, wide, _) in zip(bases, LAYOUTS[layout], strict=True)
    }
    on = {device: [base for base in bases if device in devices(base.engine)] for device in range(len(visible))}
    fits = all(sum(needs[base.name] for base in here) <= WHOLE * visible[0].total for here in on.values() if here[1:])
    if not fits:
        with pytest.raises(
            ConfigError, match=f"a, b share GPU 0 with {visible[0].total / GIB:.1f} GiB, and do not fit"
        ):
            with_room(bases, visible)
        return
    placed = {base.name: base.engine.get("gpu_memory_utilization") for base in with_room(bases, visible)}
    for device, here in on.items():
        parts = [placed[base.name] for base in here]
        if len(here) < 2:
            continue
        assert None not in parts and sum(parts) <= WHOLE
        assert all(part * visible[device].total >= needs[base.name] - 2 for part, base in zip(parts, here, strict=True))
    alone = [base for base in bases if all(len(on.get(device, [])) < 2 for device in devices(base.engine))]
    assert all(placed[base.name] is None for base in alone), "what has its GPUs alone takes what vLLM takes"
