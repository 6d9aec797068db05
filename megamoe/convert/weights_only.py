"""torch's weights-only unpickler with an allow-list of our own: other libraries add theirs to the process's."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_LOCK = threading.Lock()  # the list is the whole process's


def load_weights_only(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """The content of a file of torch.save, tensors mapped, not read. Raises whatever torch does for what it refuses."""
    import torch

    with _only(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def _only(allowed: Sequence[Any]) -> Iterator[None]:
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    with _LOCK:
        others = get_safe_globals()
        clear_safe_globals()
        try:
            add_safe_globals(list(allowed))
            yield
        finally:
            clear_safe_globals()
            add_safe_globals(others)
