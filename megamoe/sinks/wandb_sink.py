"""Weights & Biases. The step of a row is the training step; one run goes on over all attempts of a training run."""

import json
import math
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

import megamoe
from megamoe.checkpoint.files import read_small
from megamoe.checkpoint.manifest import MANIFEST
from megamoe.errors import CheckpointError
from megamoe.runs.run_folder import PLAN_FILE, checkpoint_name, checkpoints_path
from megamoe.sinks.feed import Loads, Values
from megamoe.sinks.names import STEP, load_name, load_peak_name, name_of
from megamoe.sinks.wandb_file import last_step_of_run

MAX_PLAN_BYTES = 1 << 20
FLUSH_SECONDS = 2.0  # a process that is killed loses what is younger
MOST_BARS = 512  # of a histogram, by the service's own limit

# Settings of the run, and the variable by which the user may have set each: what is set there is left alone.
_VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "name": "WANDB_NAME",
    "notes": "WANDB_NOTES",
    "dir": "WANDB_DIR",
    "resume": "WANDB_RESUME",
}


class WandbSink:
    """One run of Weights & Biases, offline or online."""

    takes_repeats = False  # the service drops steps below the last one

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """`spec` is as `megamoe.sinks.specs.tracker_specs` makes it. Raises whatever wandb does."""
        monitor, self._run_dir = spec["config"]["monitor"], spec["run_dir"]
        self._timeout_seconds, self._artifacts = monitor["wandb_timeout_seconds"], monitor["wandb_artifacts"]
        self._folder = Path(os.environ.get("WANDB_DIR") or self._run_dir) / "wandb"
        self._is_offline = spec["mode"] == "offline"
        self._run_id = spec["run_id"]
        settings = {key: monitor.get(f"wandb_{key}") for key in _VARIABLES} | {"dir": self._run_dir, "resume": "allow"}
        chosen = {key: value for key, value in settings.items() if value and not os.environ.get(_VARIABLES[key])}
        held = last_step_of_run(self._folder, self._run_id)
        self._wait_for_a_new_name()
        self._run = wandb.init(
            **chosen,
            id=self._run_id,
            mode=spec["mode"],
            config={**spec["config"], **spec["details"], "code": code_state(), **_plan(Path(self._run_dir))},
            settings=wandb.Settings(
                console="off",
                init_timeout=self._timeout_seconds,
                finish_timeout=self._timeout_seconds,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                x_stats_pid=spec["process"],
            ),
        )
        self.held_step = held if self._is_offline else self._run.starting_step - 1
        self._last_step = self.held_step
        self._known: set[str] = set()
        self._run.define_metric(STEP, hidden=True)

    def _wait_for_a_new_name(self) -> None:
        """A run's folder is named by the second: two of one run must not meet there."""
        while list(self._folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{self._run_id}*")):
            time.sleep(0.1)

    def write(self, step: int, values: Values) -> None:
        named = {}
        for key, value in values.items():
            name, summary = name_of(key)
            named[name] = value
            if name not in self._known and name != STEP:
                self._known.add(name)
                self._run.define_metric(name, step_metric=STEP, summary=summary)
        self._log(step, named)

    def write_loads(self, step: int, loads: Loads) -> None:
        found: dict[str, Any] = {STEP: step}
        for layer, counts in loads.items():
            mean = sum(counts) / len(counts)
            found[load_peak_name(layer)] = max(counts) / mean if mean else math.nan
            bars = merged(counts, MOST_BARS)
            edges = [len(counts) * number / len(bars) for number in range(len(bars) + 1)]
            found[load_name(layer)] = wandb.Histogram(np_histogram=(bars, edges))
        self._log(step, found)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)
        self._last_step = max(step, self._last_step)

    def alert(self, title: str, text: str, level: str) -> None:
        known = {each.value: each for each in wandb.AlertLevel}
        self._run.alert(title, text, level=known.get(level, wandb.AlertLevel.INFO))

    def saved(self, event: Mapping[str, Any]) -> None:
        """The manifest as an artifact, with a reference to the folder that holds the rest."""
        if not self._artifacts or not isinstance(event.get("step"), int):
            return
        folder = checkpoints_path(self._run_dir).resolve() / checkpoint_name(event["step"])
        if not (folder / MANIFEST).is_file():  # it has been cleared away meanwhile
            return
        artifact = wandb.Artifact(f"checkpoint-{self._run_id}", type="checkpoint", metadata={"step": event["step"]})
        artifact.add_file(str(folder / MANIFEST))
        artifact.add_reference(folder.as_uri(), name="checkpoint", checksum=False)
        self._run.log_artifact(artifact, aliases=[checkpoint_name(event["step"])])

    def begin_anew(self) -> None:
        raise AssertionError("a run of Weights & Biases does not take steps twice")

    def flush(self) -> None:
        pass  # it flushes by itself, every FLUSH_SECONDS

    def close(self) -> None:
        """Write out everything; raises OSError where the file on disk does not hold what was written."""
        self._run.finish()
        wandb.teardown()
        held = last_step_of_run(self._folder, self._run_id)
        if held < self._last_step:
            raise OSError(f"its file in {self._folder} ends at step {held} instead of {self._last_step}")


def _plan(run_dir: Path) -> dict[str, Any]:
    """What `megamoe plan --json` has put into the run's folder, if somebody did so."""
    try:
        return {"plan": json.loads(read_small(run_dir / PLAN_FILE, MAX_PLAN_BYTES))}
    except (OSError, ValueError, CheckpointError):
        return {}


def merged(counts: Loads, most: int) -> list[float]:
    """Counts of neighbours added up until there are no more than `most`."""
    width = math.ceil(len(counts) / most)
    return [sum(counts[first : first + width]) for first in range(0, len(counts), width)]


def code_state() -> dict[str, Any]:
    """Version of megamoe and, where it lies in a git repository, the commit and whether files differ from it."""
    root = Path(megamoe.__file__).parents[1]
    found: dict[str, Any] = {"version": megamoe.__version__}

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == root:
            found |= {"commit": git("rev-parse", "HEAD"), "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
                      "is_dirty": bool(git("status", "--porcelain"))}  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        pass  # no git, or no repository
    return found
