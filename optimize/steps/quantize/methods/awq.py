"""Channels that matter are scaled up before each weight goes to the nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimize.steps.quantize.method import Method
from optimize.steps.quantize.methods import rtn

if TYPE_CHECKING:
    from optimize.job import Progress
    from optimize.steps.calibrated import CalibratedModel
    from optimize.steps.quantize.channel_scales import ChannelScales


def scales(model: CalibratedModel, group: int, progress: Progress) -> ChannelScales:
    from optimize.steps.quantize.channel_scales import protecting

    return protecting(model, group, progress)


METHOD = Method("awq", rtn.round_, scales)
