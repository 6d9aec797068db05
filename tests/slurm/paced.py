"""Python for jobs of tests: `-m megamoe train` goes on after a step only as far as a file allows.

MEGAMOE_TEST_PACE names the file. It holds the step after which ranks wait; a run is stopped, cut or killed at a step
that the test chose, however fast the machine is. A rank that waits and is asked to stop says so by a file beside it.
Anything else is run as python would.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

LONGEST_WAIT_SECONDS = 400.0


def heard_file(path: Path) -> Path:
    return Path(f"{path}.heard")


class Pace:
    """A hook of the training loop, the last one: what belongs to a step is done before."""

    def __init__(self, path: Path) -> None:
        self._path, self._heard = path, heard_file(path)

    def on_start(self, trainer: Any) -> None: ...

    def on_end(self, trainer: Any) -> None: ...

    def after_step(self, trainer: Any, result: Any) -> None:
        deadline = time.monotonic() + LONGEST_WAIT_SECONDS
        while self._path.exists() and int(self._path.read_text() or 0) <= trainer.step:
            if trainer.engine.finalizer.stop_wanted:
                self._heard.touch()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._path} has not let step {trainer.step + 1} begin")
            time.sleep(0.02)


def train_with_pace(path: Path) -> None:
    import megamoe.training.main as main

    usual = main.train
    main.train = lambda trainer, dataset, hooks: usual(trainer, dataset, [*hooks, Pace(path)])


if __name__ == "__main__":
    assert sys.argv[1] in ("-m", "-u"), sys.argv
    sys.argv = [word for word in sys.argv if word != "-u"]
    module = sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    if module == "megamoe" and sys.argv[1:2] == ["train"] and "MEGAMOE_TEST_PACE" in os.environ:
        train_with_pace(Path(os.environ["MEGAMOE_TEST_PACE"]))
    sys.path[0] = ""
    runpy.run_module(module, run_name="__main__", alter_sys=True)
