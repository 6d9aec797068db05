"""Train the runs of a study one after another with `megamoe train`, each in a process of its own. No torch.

What is complete is left alone, what was begun goes on. A run that fails does not stop the others.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.checkpoint.files import replace_file
from megamoe.config.loading import dump_yaml
from megamoe.errors import ConfigError, TrainingInterrupted
from megamoe.progress import StatusLine
from megamoe.report.values import duration
from megamoe.study.ladder import StudyRun
from megamoe.study.processes import run_command
from megamoe.study.states import costs_of, is_trained, last_line
from megamoe.topology.flops import hardware_flops_per_token

INTERRUPTED = TrainingInterrupted.exit_code
CONFIGS, LOGS = "configs", "logs"  # folders beside the runs


@dataclass(frozen=True)
class Failure:
    """A run that could not be trained or evaluated."""

    run: str
    act: str  # training or evaluation
    exit_code: int
    message: str
    log: str


def write_config(run: StudyRun, folder: Path) -> Path:
    """The run's configuration as a file for `megamoe train`. Raises ConfigError where it cannot be written."""
    path = folder / CONFIGS / f"{run.name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, dump_yaml(run.config).encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another folder with --out") from None
    return path


def train_runs(
    runs: Sequence[StudyRun], chosen: Sequence[StudyRun], folder: Path, *, local_ranks: int | None, held: Sequence[int]
) -> list[Failure]:
    """Train those of `chosen` that are not complete; returns what failed. Raises TrainingInterrupted.

    runs: all of the study, for what their speed tells of the time that is left. held: see `run_command`.
    """
    failures, status = [], StatusLine(sys.stderr)
    waiting = [run for run in chosen if not is_trained(run)]
    if done := len(chosen) - len(waiting):
        print(f"{done} of {len(chosen)} runs are trained already", file=sys.stderr, flush=True)
    clock = _Clock(runs)
    for place, run in enumerate(waiting):
        words = ["train", str(write_config(run, folder))]
        words += ["--local-ranks", str(local_ranks)] if local_ranks else []
        log, name = folder / LOGS / f"{run.name}.train.log", f"run {done + place + 1} of {len(chosen)}: {run.name}"

        def poll(run: StudyRun = run, name: str = name, after: Sequence[StudyRun] = waiting[place + 1 :]) -> None:
            if status.is_due:
                status.show(f"{name}, {clock.told(run, after)}")

        started = time.monotonic()
        code, message = run_command(words, log, poll=poll, stop_seconds=_stop_seconds(run), held=held)
        took = duration(time.monotonic() - started)
        if code == 0 and is_trained(run):
            status.end(f"{name} is trained, {took}")
        elif code in (INTERRUPTED, 130):
            status.end()
            raise TrainingInterrupted(f"{run.name} was asked to stop: the same command goes on from its checkpoint")
        else:
            failures.append(Failure(run.name, "training", code, message, str(log)))
            status.end(f"{name} failed after {took}: {failures[-1].message}")
        clock.learn(run)
    return failures


def _stop_seconds(run: StudyRun) -> float:
    """What a run may need to end its step and to save."""
    return run.config.parallel.timeout_seconds + run.config.checkpoint.save_timeout_seconds


class _Clock:
    """Seconds that are left, from the rates of what was trained: its FLOP/s where it is another model."""

    def __init__(self, runs: Sequence[StudyRun]) -> None:
        self._flops = {run.name: run.num_tokens * hardware_flops_per_token(run.config) for run in runs}
        self._seconds: dict[str, float] = {}
        for run in runs:
            if is_trained(run):
                self.learn(run)

    def learn(self, run: StudyRun) -> None:
        last = run.config.run.num_steps
        if (seconds := costs_of(run, (last,))[last].seconds) is not None:
            self._seconds[run.name] = seconds

    def told(self, run: StudyRun, after: Sequence[StudyRun]) -> str:
        line = last_line(run)
        if not line:
            return "starting"
        num_steps, rate = run.config.run.num_steps, line["step_seconds"]
        text = f"step {line['step']}/{num_steps}"
        if line.get("tokens_per_second"):
            text += f", {line['tokens_per_second']:,.0f} tokens/s"
        if rate is None:
            return text
        left = (num_steps - line["step"]) * rate
        known = self._seconds | {run.name: num_steps * rate}
        in_all = duration(left + self._guess(after, known))
        return f"{text}, {duration(left)} left of it, about {in_all} of all training"

    def _guess(self, runs: Sequence[StudyRun], known: Mapping[str, float]) -> float:
        """A model's other seeds tell its time; else all that is known tells FLOP/s."""
        seconds_per_flop = sum(known.values()) / sum(self._flops[name] for name in known)
        total = 0.0
        for run in runs:
            alike = [seconds for name, seconds in known.items() if name.rpartition("-seed")[0] == run.model.name]
            total += sum(alike) / len(alike) if alike else self._flops[run.name] * seconds_per_flop
        return total
