"""A method of quantizing, whole: what it scales, how it rounds, what it needs and what it refuses.

Each module of `methods/` has one as `METHOD`; another package offers its own by an entry point of the group
`loradock.optimize.methods`. None of them imports torch before its functions are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize import plugins
from optimize.steps.planning import Context, calibrating, following

if TYPE_CHECKING:
    import torch

    from optimize.job import Progress
    from optimize.steps.calibrated import CalibratedModel
    from optimize.steps.quantize.channel_scales import ChannelScales

    Round = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None, int], torch.Tensor]
    Scales = Callable[[CalibratedModel, int, Progress], ChannelScales]


@dataclass(frozen=True, slots=True)
class Method:
    """`round(weight, scale, bits, hessian, vectors)` gives int8 (out, in) for `weight` (out, in) and `scale`
    (out, groups), so that weight is about integers * scale; `hessian` (in, in) is the sum of x xT over so many
    calibration `vectors`, or None where a layer is tried alone.

    `scales(model, group, progress)` are factors of channels that are moved between layers before anything is rounded;
    they are for 4 bits. `estimate(step, context)` is what it takes beside rounding to the nearest, in seconds and
    bytes; `refuse(step, context)` raises Refused. `follows`: at 4 bits `weight` is first moved towards what gives, for
    the inputs that rounded layers make, what the original gave for its own.
    """

    name: str
    round: Round
    scales: Scales | None = None
    calibrates: bool = True
    follows: bool = False
    estimate: Callable[[Any, Context], tuple[float, int]] | None = None
    refuse: Callable[[Any, Context], None] = lambda step, context: None

    def estimated(self, step: Any, context: Context) -> tuple[float, int]:
        """By `estimate`, or what its calibration takes."""
        if self.estimate is not None:
            return self.estimate(step, context)
        return following(context) if self.follows else calibrating(context)


def methods() -> Mapping[str, Method]:
    """Every method, by its name."""
    return plugins.found("optimize.steps.quantize.methods", "loradock.optimize.methods", "METHOD")
