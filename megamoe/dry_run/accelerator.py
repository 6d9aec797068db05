"""DeepSpeed's accelerator for a dry run: what it asks the machine for is answered by a device without memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

_ENOUGH_BYTES = 1 << 60


class _AcceleratorWithoutMemory(CPU_Accelerator):
    """Tensors go where `device` is; there is always room, so ZeRO flattens parameters where they lie, as a GPU does."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_name = str(device)

    def device_name(self, device_index: int | None = None) -> str:
        return self._device_name

    def current_device_name(self) -> str:
        return self._device_name

    def is_fp16_supported(self) -> bool:
        return True

    def available_memory(self, device_index: int | None = None) -> int:
        return _ENOUGH_BYTES


@contextmanager
def accelerator_without_memory(device: torch.device) -> Iterator[None]:
    """Inside, DeepSpeed's accelerator is one on `device`."""
    before = get_accelerator()
    set_accelerator(_AcceleratorWithoutMemory(device))
    try:
        yield
    finally:
        set_accelerator(before)
