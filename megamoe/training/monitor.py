"""Where a run's metrics go: terminal, log file, files of the run's folder, and tracking services. Rank 0 only."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.runs.events import EVENTS_FILE, append_event
from megamoe.runs.metrics import EXPERT_LOADS_FILE, METRICS_FILE, MetricsWriter, ProgressBar, format_line
from megamoe.sinks.specs import tracker_specs, wandb_mode, wandb_run_id
from megamoe.sinks.tracker import Tracker
from megamoe.training.report import LayerLoads


class Monitor:
    """Rank 0's voice. On other ranks every method does nothing. `run_id` is the tracking service's name of the run."""

    def __init__(
        self,
        config: Config,
        *,
        is_first: bool,
        resume_step: int,
        run_id: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """`run_id` as a checkpoint has it; `details` are told to a tracking service beside the configuration."""
        self.run_id = run_id
        self.is_first, self._num_steps, self._run_dir = is_first, config.run.num_steps, config.run.dir
        self._log, self._unwritten = None, set()
        self._trackers: list[Tracker] = []
        if not is_first:
            return
        self._bar = ProgressBar(config.run.num_steps, first_step=resume_step, enabled=config.monitor.progress_bar)
        self._log = open(Path(config.run.dir) / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 (open during the run)
        self._metrics = MetricsWriter(config.run.dir, resume_step=resume_step)
        self._loads = MetricsWriter(config.run.dir, resume_step=resume_step, name=EXPERT_LOADS_FILE)
        if wandb_mode(config) != "disabled":
            self.run_id = wandb_run_id(config, run_id)
        specs = tracker_specs(config, resume_step=resume_step, run_id=self.run_id, details=details or {})
        self._trackers = [Tracker(spec, self.say) for spec in specs]

    def say(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self._log is not None:
            self._bar.print(text)
            self._keep("log.txt", lambda: self._log.write(text + "\n"), self._log.flush)

    def _keep(self, name: str, *writes: Callable[[], Any]) -> None:
        """Write to a file of the run. A disk that is full, or gone, costs lines and not the training: it is said once,
        and what has not been written is tried again with the next line."""
        try:
            for write in writes:
                write()
        except OSError as error:
            if name not in self._unwritten:
                self._unwritten.add(name)
                self._bar.print(f"{self._run_dir}/{name} cannot be written ({error.strerror}): training goes on")

    def note(self, kind: str, message: str, **details: Any) -> None:
        """Print a line and keep it as an event of the run: see `megamoe.runs.events`."""
        if not self.is_first:
            return
        self.say(message)
        try:
            append_event(self._run_dir, kind, message, **details)
        except OSError as error:
            self.say(f"{self._run_dir}/{EVENTS_FILE} cannot be written ({error.strerror})")
        self._look_after_trackers()

    def go_back_to(self, step: int) -> None:
        """Training was taken back to `step`: metrics of later steps are cut off, as at a resume."""
        if self.is_first:
            self._metrics.cut_after(step)
            self._loads.cut_after(step)

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Tell people, by a tracking service if there is one. `level`: INFO, WARN or ERROR."""
        self.note("alert", text, title=title, level=level)

    def record(self, metrics: dict[str, Any]) -> None:
        """Print and keep a set of metrics; `step` among them."""
        if self.is_first:
            self.say(format_line(metrics, num_steps=self._num_steps))
            self._keep(METRICS_FILE, lambda: self._metrics.write(metrics))
            self._look_after_trackers()

    def record_loads(self, step: int, loads: LayerLoads) -> None:
        """Keep what each layer's experts were sent; before the metrics of that step are recorded."""
        if self.is_first:
            layers = {str(layer): [round(count) for count in counts] for layer, counts in loads.items()}
            self._keep(EXPERT_LOADS_FILE, lambda: self._loads.write({"step": step, "layers": layers}))

    def show_step(self, step: int) -> None:
        if self.is_first:
            self._bar.update(step)

    def _look_after_trackers(self) -> None:
        for tracker in self._trackers:
            tracker.look_after()

    def close(self, *, waits: bool = True) -> None:
        """waits: until tracking services have all; else they end by themselves, within their own bounds."""
        if self._log is None:
            return
        for tracker in self._trackers:
            tracker.close() if waits else tracker.let_go()
        self._bar.close()
        self._keep(METRICS_FILE, self._metrics.close)
        self._keep(EXPERT_LOADS_FILE, self._loads.close)
        self._keep("log.txt", self._log.close)
