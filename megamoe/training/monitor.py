"""Where a run's metrics go: terminal, log file, metrics.jsonl, Weights & Biases. Rank 0 only."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.training.metrics import MetricsWriter, ProgressBar, format_line


class WandbSink:
    """Weights & Biases, offline unless asked otherwise; x axis is the step."""

    def __init__(self, config: Config, run_id: str | None) -> None:
        import wandb

        monitor = config.monitor
        self._run = wandb.init(
            project=monitor.wandb_project,
            name=monitor.wandb_name,
            mode=monitor.wandb_mode,
            dir=config.run.dir,
            config=config.model_dump(mode="json"),
            # A resumed run goes on in the same curves, if the service has them.
            **({} if run_id is None else {"id": run_id, "resume": "allow"}),
        )
        self.run_id: str | None = getattr(self._run, "id", None)

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


class Monitor:
    """Rank 0's voice. On other ranks every method does nothing. `run_id` is the tracking service's name of the run."""

    def __init__(self, config: Config, *, is_first: bool, resume_step: int, run_id: str | None = None) -> None:
        self.run_id = run_id
        self.is_first, self._num_steps = is_first, config.run.num_steps
        self._log = None
        self._tracker: WandbSink | None = None
        if not is_first:
            return
        self._bar = ProgressBar(config.run.num_steps, first_step=resume_step, enabled=config.monitor.progress_bar)
        self._log = open(Path(config.run.dir) / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 (open during the run)
        self._metrics = MetricsWriter(config.run.dir, resume_step=resume_step)
        if config.monitor.wandb_mode != "disabled":
            with self._tracking("not used"):
                self._tracker = WandbSink(config, run_id)
                self.run_id = self._tracker.run_id

    @contextmanager
    def _tracking(self, state: str) -> Iterator[None]:
        """A run must not fail because a tracking service does: it goes on with metrics.jsonl."""
        try:
            yield
        except Exception as error:  # wandb raises many kinds, network errors of other libraries among them
            logging.getLogger(__name__).debug("wandb failed", exc_info=True)
            self._tracker = None
            self.say(f"Weights & Biases is {state}: {error}. Metrics go to metrics.jsonl")

    def say(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self._log is not None:
            self._bar.print(text)
            self._log.write(text + "\n")
            self._log.flush()

    def record(self, metrics: dict[str, Any]) -> None:
        """Print and keep a set of metrics; `step` among them."""
        if self.is_first:
            self.say(format_line(metrics, num_steps=self._num_steps))
            self._metrics.write(metrics)
            if self._tracker is not None:
                with self._tracking("no longer used"):
                    self._tracker.write(metrics)

    def show_step(self, step: int) -> None:
        if self.is_first:
            self._bar.update(step)

    def close(self) -> None:
        if self._log is None:
            return
        if self._tracker is not None:
            with self._tracking("not complete"):
                self._tracker.close()
        self._bar.close()
        self._metrics.close()
        self._log.close()
