"""A device beside the CPU, in PyTorch itself: its tensors lie in the CPU's memory, and mix with others as a GPU's do.

`made()` gives its name. Whatever computes with tensors of both devices, or asks for the bytes of one that is not on the
CPU, gets the error that it would get with a GPU. It shows nothing of a GPU's arithmetic, memory or speed.
"""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
LIBRARY: list[torch.library.Library] = []  # whose rules hold as long as it is kept
aten = torch.ops.aten
# PyTorch's own, whose types it does not say.
DATA: Any = torch.Tensor.data
WRAPPER: Any = torch.Tensor._make_wrapper_subclass
# What a GPU takes a tensor of the CPU's for.
CROSSING = {aten._to_copy.default, aten.copy_.default}
# What autocast does for them; it knows no rules for this device.
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}


class Elsewhere(torch.Tensor):
    """A tensor of the second device; `held` is where its numbers are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made: Elsewhere = WRAPPER(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=f"{NAME}:0", requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        there: torch.Tensor = DATA.__get__(self)
        return there

    @data.setter
    def data(self, new: Elsewhere) -> None:
        DATA.__set__(self, new)
        self.held = new.held

    def tolist(self) -> Any:
        """A GPU's come over for it; PyTorch refuses a subclass of its tensors."""
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    own = [each for each in flat if isinstance(each, Elsewhere)]
    wanted = kwargs.get("device")
    named = wanted is not None and torch.device(wanted).type == NAME
    if not own and not named:
        return func(*args, **kwargs)
    others = [
        each for each in flat if isinstance(each, torch.Tensor) and not isinstance(each, Elsewhere) and each.dim()
    ]
    if own and others and func not in CROSSING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {NAME} and cpu")
    if func is aten._fused_sdp_choice.default:
        return 0
    plain = [each.held if isinstance(each, Elsewhere) else each for each in flat]
    plain = [torch.device("cpu") if isinstance(each, torch.device) and each.type == NAME else each for each in plain]
    if func in PRODUCTS and len({each.dtype for each in plain if isinstance(each, torch.Tensor)}) > 1:
        plain = [each.bfloat16() if isinstance(each, torch.Tensor) else each for each in plain]
    inside, named_inside = tree_unflatten(plain, spec)
    made = func(*inside, **named_inside)
    if wanted is not None and not named:
        return made
    if func is aten.copy_.default and not isinstance(args[0], Elsewhere):
        return args[0]
    wrapped = tree_map(lambda each: Elsewhere(each) if isinstance(each, torch.Tensor) else each, made)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if own else wrapped


def made() -> str:
    """The device's name, once it is known to PyTorch."""
    module = _DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    _setup_privateuseone_for_python_backend(NAME, module)
    LIBRARY.append(torch.library.Library("_", "IMPL", "AutocastPrivateUse1"))
    LIBRARY[0].fallback(torch.library.fallthrough_kernel)
    torch.inference_mode = torch.no_grad  # which tensors that are subclasses cannot be made in
    Dispatch().__enter__()
    save: Any = safetensors.torch.save_file  # which brings a GPU's tensors over itself
    safetensors.torch.save_file = lambda tensors, *more, **named: save(
        {name: tensor.cpu() for name, tensor in tensors.items()}, *more, **named
    )
    place: Any = safetensors.torch.storage_ptr
    safetensors.torch.storage_ptr = lambda tensor: place(getattr(tensor, "held", tensor))
    for name in ("tensor", "as_tensor"):  # which move their numbers beneath any dispatch
        setattr(torch, name, _moved_openly(getattr(torch, name)))
    return f"{NAME}:0"


def _moved_openly(make: Any) -> Any:
    def made_there(data: Any, *, device: Any = None, **named: Any) -> torch.Tensor:
        if isinstance(data, Elsewhere):
            return data.to(device=device or data.device, **named)
        wanted = torch.device(device or _device.CURRENT_DEVICE or "cpu")
        tensor: torch.Tensor = make(data, device="cpu" if wanted.type == NAME else device, **named)
        return tensor.to(wanted)

    return made_there
