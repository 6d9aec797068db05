"""What this rank is at, as its watchdog sees it. The training thread writes, the watchdog's thread reads."""

from megamoe.phases import CLOCK, PhaseClock

SLOW_PHASES = frozenset({"save", "validate", "sample"})


class Progress:
    """Stage, step and phase of a rank, and a mark that changes as long as it gets on.

    Stages: setup (model, groups), load (a checkpoint), first_step, train, close.
    """

    def __init__(self, clock: PhaseClock = CLOCK) -> None:
        self._clock = clock
        self.stage = "setup"
        self.step = 0

    @property
    def mark(self) -> tuple[int, int, str]:
        return self._clock.num_changes, self.step, self.stage

    @property
    def phase(self) -> str:
        """What the rank does: the outermost slow phase, else the innermost one, else its stage."""
        return self._name(self._clock.active)

    def phase_of(self, error: BaseException) -> str:
        """Where the rank was when `error` came up."""
        return self._name(getattr(error, "phases", ()))

    def _name(self, active: tuple[str, ...]) -> str:
        return next((name for name in active if name in SLOW_PHASES), active[-1] if active else self.stage)

    @property
    def is_slow(self) -> bool:
        """Whether it may take longer than usual for the next sign of progress."""
        return self.stage != "train" or any(name in SLOW_PHASES for name in self._clock.active)
