"""`stop` in a run's folder: the wish of a person that training finish its step, save and end. No torch."""

import os
import time
from pathlib import Path

STOP_FILE, HEEDED_FILE = "stop", "stop.done"
CHECK_INTERVAL_SECONDS = 1.0  # a look at a shared file system may take a millisecond


class StopFile:
    """The stop file of one run's folder."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path, self._heeded = Path(run_dir) / STOP_FILE, Path(run_dir) / HEEDED_FILE
        self._looked, self._was_there = -CHECK_INTERVAL_SECONDS, False

    def is_there(self) -> bool:
        return os.path.exists(self.path)

    def was_there(self) -> bool:
        """As `is_there`, but looks at most once in CHECK_INTERVAL_SECONDS."""
        now = time.monotonic()
        if now - self._looked >= CHECK_INTERVAL_SECONDS:
            self._looked, self._was_there = now, self.is_there()
        return self._was_there

    def set_aside(self) -> str | None:
        """The wish is fulfilled: rename the file, so that the next start goes on; a sentence if that fails."""
        try:
            os.replace(self.path, self._heeded)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.path} cannot be renamed ({error.strerror}): remove it before the next start"
        return None
