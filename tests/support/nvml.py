"""NVIDIA's management library without a driver: cards with so much memory, some cut into slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

GIB = 1 << 30


class NVMLError(Exception):
    pass


@dataclass
class Device:
    """A card, or one of its slices; sizes in GiB."""

    name: str
    total: float
    free: float
    uuid: str = ""
    capability: tuple[int, int] = (9, 0)
    slices: list[Device] = field(default_factory=list)
    card: Device | None = None


@dataclass
class Nvml:
    """The functions that are called of nvidia-ml-py. `broken`: the driver answers nothing."""

    devices: list[Device]
    broken: bool = False
    open: int = 0
    NVMLError = NVMLError

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("Driver/library version mismatch")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        for device in [*self.devices, *(part for card in self.devices for part in card.slices)]:
            if device.uuid == uuid:
                return device
        raise NVMLError("Not Found")

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> SimpleNamespace:
        return SimpleNamespace(total=int(device.total * GIB), free=int(device.free * GIB))

    def nvmlDeviceGetName(self, device: Device) -> str:
        return device.name

    def nvmlDeviceGetCudaComputeCapability(self, device: Device) -> tuple[int, int]:
        return device.capability

    def nvmlDeviceGetMigMode(self, device: Device) -> tuple[int, int]:
        if device.capability < (8, 0):
            raise NVMLError("Not Supported")
        return (int(bool(device.slices)),) * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, number: int) -> Device:
        if number < 7 - len(device.slices):  # the numbers that are taken need not be the first
            raise NVMLError("Not Found")
        return device.slices[number - 7 + len(device.slices)]

    def nvmlDeviceIsMigDeviceHandle(self, device: Device) -> int:
        return int(device.card is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device: Device) -> Device:
        assert device.card is not None
        return device.card


def cut(card: Device, *sizes: float) -> Device:
    """The card in slices of these sizes, in GiB."""
    card.slices = [
        Device(f"{card.name} MIG {size:g}gb", size, size - 0.1, f"MIG-{number}", card.capability, card=card)
        for number, size in enumerate(sizes)
    ]
    return card
