"""Why a set of ranks did not end well, in the words the user reads."""

import signal
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Failure:
    """Why a set of ranks did not end well: the first rank that failed, and how."""

    kind: Literal["user", "exception", "exit", "killed", "timeout", "stopped", "import", "server", "interrupted"]
    rank: int | None  # None where no single rank is to blame
    message: str
    exit_code: int
    traceback: str = ""
    output: str = ""  # the last output of a captured rank

    @property
    def report(self) -> str:
        """What the user reads: one sentence for what is theirs to mend, all we know for everything else."""
        if self.kind == "interrupted":
            return f"megamoe: {self.message}"
        if self.kind == "user":
            return f"megamoe: error: {self.message}"
        parts = [self.message]
        if self.traceback:
            parts.append(self.traceback.rstrip())
        if self.output.strip():
            parts.append(f"Last output of rank {self.rank}:\n{self.output.rstrip()}")
        return "\n".join(parts)


def stopped_by(number: int) -> Failure:
    """The end of a launch that the user brought about with a signal."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return Failure("stopped", None, f"Stopped by {name}.", 128 + number)


def status_text(status: int) -> str:
    """A wait status in words: negative numbers are signals."""
    return f"signal {-status}, {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
