"""Bytes of tensors that are alive on this rank, as an allocator without rounding would count them.

A storage counts from the operator that first returns a tensor over it until its memory is let go of. What one kernel
takes and gives back by itself is not seen, nor what was there before the meter was entered.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """Use as a context manager. `live_bytes` now; `peak_bytes` and `recent_peak_bytes` the most since their resets.

    `of_meta`: whether tensors on the meta device count. Of a rank without memory they are the rank; of a real one they
    are shapes that somebody noted.
    """

    def __init__(self, *, of_meta: bool) -> None:
        super().__init__()
        self._of_meta = of_meta
        self.live_bytes = self.peak_bytes = self.recent_peak_bytes = 0
        self._alive: dict[int, tuple[Any, int]] = {}  # address of the storage -> its end, its bytes

    def reset_peak(self) -> None:
        self.peak_bytes = self.recent_peak_bytes = self.live_bytes

    def reset_recent_peak(self) -> None:
        self.recent_peak_bytes = self.live_bytes

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of these no longer."""
        for tensor in tensors:
            self._forget(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for each in result:
                if isinstance(each, Tensor):
                    self._see(each)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.is_meta and not self._of_meta:
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._alive.get(address)
        if known is not None:
            if known[1] == size:
                return
            self._forget(address)  # resized in place
        self._alive[address] = weakref.ref(storage, lambda _: self._forget(address)), size
        self.live_bytes += size
        self.recent_peak_bytes = max(self.recent_peak_bytes, self.live_bytes)
        self.peak_bytes = max(self.peak_bytes, self.recent_peak_bytes)

    def _forget(self, address: int) -> None:
        _, size = self._alive.pop(address, (None, 0))
        self.live_bytes -= size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under `tensors`."""
    storages: dict[int, UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
    return sum(storage.nbytes() for storage in storages.values())
