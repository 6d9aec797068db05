"""Time as a watchdog counts it."""

import time
from collections.abc import Callable


class PatientClock:
    """Seconds during which this process was running.

    A process that was suspended, or did not come to run, finds afterwards that nobody has been heard for long: that
    time says nothing about the others. No step of the clock is longer than `longest_seconds`, so it must be read more
    often than that.
    """

    def __init__(self, longest_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._longest, self._now = longest_seconds, now
        self._last = now()
        self._seconds = 0.0

    def read(self) -> float:
        now = self._now()
        self._seconds += min(now - self._last, self._longest)
        self._last = now
        return self._seconds
