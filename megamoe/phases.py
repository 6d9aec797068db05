"""What a rank is doing at the moment, and how long it has done what: time by phase, nested phases counted once.

    data         reading samples and handing them to the device
    forward      the model's layers and the loss
    backward     their gradients
    all_to_all   rows on their way to experts and back, in both passes
    reduce       gradients summed over ranks, and their norm
    update       optimizer and the weights' way back
    validate, save, sample
    pipeline     the rest of a step: waiting for other stages, sending to them

The time of a phase inside another is the inner one's alone, so that all phases add up to the time that has passed;
but validate, save and sample keep what happens inside them, so that a forward pass that trains nothing is not training.
One clock a process, as with logging: a rank does one thing at a time, whichever of autograd's threads does it.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class DeviceStamp(Protocol):
    """A recorded moment of a device's queue, such as torch.cuda.Event(enable_timing=True)."""

    def elapsed_time(self, end: "DeviceStamp") -> float:
        """Milliseconds from this moment to `end`."""
        ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        """Whether the device has come past this moment."""
        ...


KEEP_ALL = frozenset({"validate", "save", "sample"})
MANY_STAMPS = 4096


class PhaseClock:
    """Time by phase. `num_changes` grows whenever a phase begins or ends, on a rank that works: a sign of life."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._stack: list[str] = []
        self._keeper: int | None = None  # place in the stack of a phase that keeps what happens inside it
        self._seconds: dict[str, float] = {}
        self._since = now()
        self._record: Callable[[], DeviceStamp] | None = None
        self._stamps: list[tuple[DeviceStamp, str]] = []  # a moment, and the phase that ended there
        self.num_changes = 0

    def use_device_stamps(self, record: Callable[[], DeviceStamp] | None) -> None:
        """Measure by moments of a device's queue, which `record` puts there: a GPU runs behind the host. None: by
        the host's clock. What was measured before is forgotten."""
        self._record = record
        self._seconds, self._since = {}, self._now()
        self._stamps = [(record(), "")] if record is not None else []

    @property
    def current(self) -> str | None:
        """The innermost phase."""
        return self._stack[-1] if self._stack else None

    @property
    def active(self) -> tuple[str, ...]:
        """All phases, the outermost first."""
        return tuple(self._stack)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._change()
        self._stack.append(name)
        if self._keeper is None and name in KEEP_ALL:
            self._keeper = len(self._stack) - 1
        try:
            yield
        except BaseException as error:
            error.__dict__.setdefault("phases", self.active)  # the innermost: it is over before anybody asks
            raise
        finally:
            self._change()
            self._stack.pop()
            if self._keeper == len(self._stack):
                self._keeper = None

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call. With device stamps, waits for the device."""
        self._change()
        if self._record is not None:
            self._stamps[-1][0].synchronize()
            self._add_stamps(len(self._stamps))
        taken, self._seconds = self._seconds, {}
        return taken

    def _change(self) -> None:
        """The phase on top is over, or interrupted."""
        self.num_changes += 1
        name = self._stack[-1 if self._keeper is None else self._keeper] if self._stack else ""
        if self._record is not None:
            self._stamps.append((self._record(), name))
            if len(self._stamps) > MANY_STAMPS and self._stamps[len(self._stamps) // 2][0].query():
                self._add_stamps(len(self._stamps) // 2 + 1)
            return
        now = self._now()
        self._add(name, now - self._since)
        self._since = now

    def _add_stamps(self, count: int) -> None:
        """Count the first `count` stamps, which the device has come past; the last of them begins the next phase."""
        for (begin, _), (end, name) in itertools.pairwise(self._stamps[:count]):
            self._add(name, begin.elapsed_time(end) / 1000)
        del self._stamps[: count - 1]

    def _add(self, name: str, seconds: float) -> None:
        if name:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds


CLOCK = PhaseClock()
phase = CLOCK.phase
