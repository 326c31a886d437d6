"""How a quantized layer lies in a checkpoint, written and read: compressed-tensors' formats, and GPTQ's.

int8, float8 a row or a 128 x 128 block, int4 in groups, NVFP4 and MXFP4 in compressed-tensors, which vLLM takes; int4
in groups also as GPTQ, which onnxruntime-genai's builder takes too. What is read is dense again, as the numbers that
the engine multiplies with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optimize.checkpoint.checkpoint import GPTQ, QUANTIZED, Checkpoint, Schemes
from optimize.errors import Refused

BLOCK = 128  # rows and columns of one float8 scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Level:
    """How a unit's weights are kept, and whether its input is rounded.

    `preset` names what compressed-tensors calls it where that computes the numbers (float 4, float 8 in blocks).
    """

    name: str
    bits: int
    activations: bool = False
    float8: bool = False
    preset: str = ""

    def bytes(self, elements: int, group: int) -> float:
        return elements * (self.bits / 8 + (2 / group if self.bits == 4 else 0))

    @property
    def scheme(self) -> Any:
        from compressed_tensors.quantization import preset_name_to_scheme

        return preset_name_to_scheme(self.preset, ["Linear"])


W4 = Level("w4a16", 4)
W8A8 = Level("w8a8", 8, activations=True)
W8A16 = Level("w8a16", 8)
FP8 = Level("fp8", 8, activations=True, float8=True)
FULL = Level("bf16", 16)
LEVELS = {
    level.name: level
    for level in (
        W4, W8A8, W8A16, FP8, FULL,
        Level("fp8-block", 8, activations=True, preset="FP8_BLOCK"),
        Level("nvfp4", 4, activations=True, preset="NVFP4"),
        Level("nvfp4a16", 4, preset="NVFP4A16"),
        Level("mxfp4", 4, activations=True, preset="MXFP4"),
        Level("mxfp4a16", 4, preset="MXFP4A16"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rounded:
    """One rounded layer: `dense` (out, in) float32 is what the engine computes with; `tensors` by their last name."""

    dense: torch.Tensor
    tensors: Mapping[str, torch.Tensor]


def whole(integers: torch.Tensor, scale: torch.Tensor, level: Level, form: str) -> Rounded:
    """Integers or float8 (out, in) with scales (out, groups)."""
    dense = dequantized(integers, scale)
    if form == "gptq":
        return Rounded(dense, _gptq(integers, scale))
    if level.bits == 4 or level is W8A16:
        packed = packed_integers(integers, level.bits)
        shape = torch.tensor(integers.shape)
        return Rounded(dense, {"weight_packed": packed, "weight_shape": shape, "weight_scale": scale.bfloat16()})
    return Rounded(dense, {"weight": integers, "weight_scale": scale.bfloat16()})


def preset(weights: list[torch.Tensor], level: Level, widest_input: torch.Tensor | None) -> list[Rounded]:
    """The layers of one unit in float 4 or in float 8 blocks, to the nearest, by compressed-tensors' own rules.

    NVFP4 has one more scale for the whole matrix, which is the unit's, since the engine fuses it.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = level.scheme
    args = scheme.weights
    more: dict[str, torch.Tensor] = {}
    if level.preset.startswith("NVFP4"):
        largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
        more["weight_global_scale"] = generate_gparam(-largest, largest)
        if widest_input is not None:
            more["input_global_scale"] = generate_gparam(-widest_input, widest_input)
    compressor = BaseCompressor.get_value_from_registry(form_of(level))
    made = []
    for weight in weights:
        lowest, highest = _extremes(weight, args)
        scale, _ = calculate_qparams(lowest, highest, args, global_scale=more.get("weight_global_scale"))
        own = {name: tensor.clone() for name, tensor in more.items()}  # a file holds no tensor twice
        tensors = compressor.compress({"weight": weight, "weight_scale": scale.float(), **own}, scheme)
        made.append(Rounded(_dense(tensors, {"weights": args.model_dump(), "format": form_of(level)}), tensors))
    return made


def form_of(level: Level) -> str:
    """compressed-tensors' name of a level's format."""
    if level.preset.startswith(("NVFP4", "MXFP4")):
        return f"{level.preset[:5].lower()}-pack-quantized"
    if level.float8 or level.preset:
        return "float-quantized"
    return "pack-quantized" if level.bits == 4 or level is W8A16 else "int-quantized"


def group_config(level: Level, group: int) -> dict[str, Any]:
    """A level as a config group of compressed-tensors, without its targets."""
    if level.preset:
        preset_config = level.scheme.model_dump(mode="json", exclude={"targets"}, exclude_none=True)
        return {"input_activations": None, "output_activations": None, **preset_config, "format": form_of(level)}
    symmetric = {"symmetric": True, "type": "float" if level.float8 else "int", "num_bits": level.bits}
    grouped: dict[str, Any] = {"strategy": "channel", "group_size": None}
    if level.bits == 4:
        grouped = {"strategy": "group", "group_size": group}
    return {
        "weights": {**symmetric, **grouped, "dynamic": False},
        "input_activations": {**symmetric, "strategy": "token", "dynamic": True} if level.activations else None,
        "output_activations": None,
        "format": form_of(level),
    }


def gptq_config(group: int, full: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ checkpoint; `full` are layers that kept all their bits."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    if full:
        config["dynamic"] = {f"-:{name.replace('.', chr(92) + '.')}$": {} for name in full}
    return config


def dense(checkpoint: Checkpoint, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by the name that it has in a model that was never quantized, one at a time; of those that the file
    calls so the `wanted`."""
    scheme, names = Schemes(checkpoint.quantization), checkpoint.entries
    for name in filter(wanted, names):
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts = {part: checkpoint.tensor(f"{module}.{part}") for part in GPTQ if f"{module}.{part}" in names}
            yield f"{module}.weight", _from_gptq(parts)
        elif leaf == "weight_packed" or (leaf == "weight" and f"{module}.weight_scale" in names):
            parts = {part: checkpoint.tensor(f"{module}.{part}") for part in QUANTIZED if f"{module}.{part}" in names}
            parts[leaf] = checkpoint.tensor(name)
            group = scheme.of(module)
            if group is None:
                raise Refused(f"{checkpoint.folder.name}: its config does not say how {module} is quantized")
            yield f"{module}.weight", _dense(parts, group)
        elif leaf not in QUANTIZED:
            yield name, checkpoint.tensor(name)


def dequantized(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """Integers or float8 (out, in), less zero points (out, groups), times scales (out, groups), in float32."""
    rows, columns = weight.shape
    groups = scale.shape[1]
    parts = weight.float().view(rows, groups, columns // groups)
    if zero is not None:
        parts = parts - zero.float()[:, :, None]
    return (parts * scale.float()[:, :, None]).view(rows, columns)


def _dense(parts: Mapping[str, torch.Tensor], group: Mapping[str, Any]) -> torch.Tensor:
    scale, args = parts["weight_scale"], group["weights"]
    if args["strategy"] == "block":
        rows, columns = parts["weight"].shape
        spread = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return parts["weight"].float() * spread
    if "weight" in parts:
        return dequantized(parts["weight"], scale, parts.get("weight_zero_point"))
    if args["type"] == "float":
        packed = parts["weight_packed"]
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
        numbers = torch.tensor([*E2M1, *(-value for value in E2M1)])[nibbles]
        wide = 2.0 ** (scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        if "weight_global_scale" in parts:
            wide = wide / parts["weight_global_scale"].float()
        return dequantized(numbers, wide)
    rows, columns = parts["weight_shape"].tolist()
    bits = int(args["num_bits"])
    integers, zero = unpacked_integers(parts["weight_packed"], bits)[:rows, :columns], None
    if "weight_zero_point" in parts:  # packed along the rows
        zero = unpacked_integers(parts["weight_zero_point"].T, bits).T[:rows]
    if "weight_g_idx" in parts:  # a group for each column, in any order
        of_column = parts["weight_g_idx"].long()
        wide, zeros = scale[:, of_column], None if zero is None else zero[:, of_column]
        return dequantized(integers, wide, zeros)
    return dequantized(integers, scale, zero)


def packed_integers(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in) of 4 or 8 bits in int32, the first in the lowest bits and zero in the middle: compressed-tensors'
    layout, whose own packing takes ten times as long."""
    short = -integers.shape[1] % (32 // bits)
    unsigned = torch.nn.functional.pad((integers + (1 << (bits - 1))).view(torch.uint8), (0, short))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)


def unpacked_integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in) of what lies in int32, with the padding."""
    if bits not in (4, 8):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        return unpack_from_int32(packed, bits, torch.Size((len(packed), packed.shape[1] * (32 // bits))))
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], -1).flatten(1)
        return unsigned.view(torch.int8) - 8
    return (unsigned ^ 128).view(torch.int8)


def _extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest of each block or group."""
    rows, columns = weight.shape
    if args.strategy == "block":
        tall, wide = math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)
        padded = torch.nn.functional.pad(weight, (0, wide * BLOCK - columns, 0, tall * BLOCK - rows))
        blocks = padded.view(tall, BLOCK, wide, BLOCK)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.view(rows, -1, args.group_size)
    return groups.amin(-1), groups.amax(-1)


def _gptq(integers: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQ's layout: eight inputs of one output in an int32, the zero point of 8 kept as 7."""
    rows, columns = integers.shape
    groups = scale.shape[1]
    nibbles = (integers.to(torch.int64) + 8).T.reshape(columns // 8, 8, rows)
    shifts = torch.arange(0, 32, 4).view(1, 8, 1)
    words = (nibbles << shifts).sum(1)
    zeros = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
    return {
        "qweight": torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32),
        "qzeros": zeros,
        "scales": scale.T.contiguous().half(),
        "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
    }


def _from_gptq(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4)
    words = parts["qweight"].to(torch.int64)
    nibbles = ((words[:, None, :] >> shifts.view(1, 8, 1)) & 15).flatten(0, 1)  # (in, out)
    zeros = ((parts["qzeros"].to(torch.int64)[:, :, None] >> shifts) & 15).flatten(1) + 1  # (groups, out)
    columns, groups = len(nibbles), len(zeros)
    of = parts["g_idx"].long() if "g_idx" in parts else torch.arange(columns) // (columns // groups)
    return ((nibbles - zeros[of]).float() * parts["scales"].float()[of]).T.contiguous()
