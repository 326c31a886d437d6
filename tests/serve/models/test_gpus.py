"""What CUDA would show to this process is what is planned with: cards, slices, and nothing where no driver answers."""

from __future__ import annotations

import pytest

from serve.config import load
from serve.errors import ConfigError
from serve.models import gpus, hardware
from serve.models.gpus import cards, check_present
from serve.server import launch
from tests.support.nvml import GIB, Device, Nvml, cut

H100 = Device("NVIDIA H100 80GB HBM3", 79.6, 78.9, "GPU-a")
A10 = Device("NVIDIA A10", 22.5, 22.2, "GPU-b", (8, 6))
T4 = Device("Tesla T4", 15.6, 15.3, "GPU-c", (7, 5))


def of(*devices, visible=None):
    return cards({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, Nvml(list(devices)))


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA A10", "Tesla T4"]),
        ("1", ["NVIDIA A10"]),
        ("2, 0", ["Tesla T4", "NVIDIA H100 80GB HBM3"]),
        ("GPU-b,GPU-a", ["NVIDIA A10", "NVIDIA H100 80GB HBM3"]),
        ("0,7,1", ["NVIDIA H100 80GB HBM3"]),  # CUDA stops at the first that is none
        ("", []),
        ("-1", []),
    ],
)
def test_those_that_a_process_may_see_in_its_order(visible, names):
    assert [card.name for card in of(H100, A10, T4, visible=visible)] == names


def test_memory_and_capability_are_the_drivers():
    (card,) = of(A10)
    assert (card.total, card.free, card.capability) == (int(22.5 * GIB), int(22.2 * GIB), (8, 6))


@pytest.mark.parametrize(("visible", "gib"), [(None, 20), ("0", 20), ("MIG-1", 10), ("GPU-d", 20)])
def test_of_a_card_in_slices_the_slice_counts(visible, gib):
    whole = cut(Device("NVIDIA H100", 79.6, 70.0, "GPU-d"), 20, 10)
    (card,) = of(whole, H100, visible=visible)
    assert (card.total, card.capability, card.in_slices) == (gib * GIB, (9, 0), True)


def test_a_driver_that_does_not_answer_is_no_error(caplog, monkeypatch):
    assert cards({}, Nvml([H100], broken=True)) == []
    assert "version mismatch" in caplog.text
    assert cards({"CUDA_VISIBLE_DEVICES": "GPU-unknown"}, Nvml([H100])) == []
    monkeypatch.setattr(gpus, "_library", lambda: None)
    assert cards({}) == []


def test_the_library_is_closed_again():
    nvml = Nvml([H100])
    cards({}, nvml)
    cards({"CUDA_VISIBLE_DEVICES": "GPU-unknown"}, nvml)
    assert nvml.open == 0


@pytest.mark.parametrize("device", ["nvidia0", "dxg", "kfd", "dri/renderD128"])
def test_where_a_driver_shows_a_device_vllm_may_look_for_it(device, tmp_path):
    with pytest.raises(ConfigError, match="no GPU here: .*docker run --gpus all.*loradock\\[cpu\\] in place of"):
        check_present(tmp_path, {})
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    check_present(tmp_path, {})
    check_present(tmp_path, {"CUDA_VISIBLE_DEVICES": "1"})
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES='' hides all of them"):
        check_present(tmp_path, {"CUDA_VISIBLE_DEVICES": ""})


def test_a_start_without_a_driver_ends_in_the_sentence_before_anything_is_loaded(monkeypatch):
    """As in the image for GPUs on a machine without one."""
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    monkeypatch.setattr(gpus, "DEVICE_FILES", ("no-such-device",))
    monkeypatch.setattr(launch, "find", lambda *_: pytest.fail("nothing is fetched"))
    with pytest.raises(ConfigError, match="no GPU here"):
        launch.serve(load([], {}))
