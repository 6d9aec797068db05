"""SIGTERM and SIGUSR1: finish the step, save, leave. All ranks hear of it in the gradient norm's own all-reduce."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megamoe.training.gradients import GradientFinalizer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_signals_heeded(finalizer: GradientFinalizer) -> Iterator[None]:
    """Inside, STOP_SIGNALS set `finalizer.stop_wanted` instead of ending this process. Main thread only.

    After an error they go on to end nothing: a rank that is about to say what happened is not to be silenced by a
    launcher that ends it because another one failed.
    """

    def note(number: int, frame: Any) -> None:
        finalizer.stop_wanted = True

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
