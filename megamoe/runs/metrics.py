"""What a run records and shows: `metrics.jsonl`, one readable line per interval, a progress bar. No torch here.

Keys of a training line: step, time (seconds since 1970, UTC), loss, lm_loss, aux_loss,
perplexity, grad_norm, lr, tokens_per_second, step_seconds, samples, tokens, skipped_steps, memory_bytes, loss_scale,
global_batch_size; with the guard spikes and rolled_back_steps; with experts z_loss, dropped_fraction,
dropped_first_fraction, dropped_second_fraction, unused_experts, router_logit_rms and expert_load_max_over_mean,
_entropy, _top_fifth, _bottom_fifth, dead_experts (megamoe.training.report says what they are); of speed
tokens_per_second_per_rank, model_flops_per_second, hardware_flops_per_second, flops_utilization and seconds_PHASE
(megamoe.training.throughput). A validation line has step, valid_loss, valid_perplexity, and valid_loss/NAME,
valid_perplexity/NAME of corpora with a name; of a classifier valid_accuracy in the perplexity's place. More keys may
be added; none is required but `step`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TextIO

from megamoe.checkpoint.files import replace_file

METRICS_FILE = "metrics.jsonl"
EXPERT_LOADS_FILE = "expert_loads.jsonl"  # {"step": 200, "layers": {"1": [tokens of each expert], ...}}
NONFINITE_KEY = "nonfinite"  # a line's keys whose value was NaN or infinite: JSON has no such numbers
BAR_WIDTH = 24
BAR_INTERVAL_SECONDS = 0.1


class MetricsWriter:
    """Appends JSON lines to `metrics.jsonl` of a run folder, or to another such file, each flushed, so that readers
    may follow."""

    def __init__(self, run_dir: str | os.PathLike[str], *, resume_step: int = 0, name: str = METRICS_FILE) -> None:
        """`resume_step`: the step that training goes on from; what later steps once wrote is cut off (0: all)."""
        self.path = Path(run_dir) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_steps(self.path, resume_step)
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open while the run goes on)

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._file.write(to_json_line(metrics) + "\n")
        self._file.flush()

    def cut_after(self, step: int) -> None:
        """Training was taken back to `step`: what later steps once wrote goes."""
        self._file.close()
        keep_steps(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        self._file.close()


def to_json_line(metrics: Mapping[str, Any]) -> str:
    """One line of valid JSON: a non-finite number becomes null, and its key is listed under "nonfinite"."""
    plain = {key: _plain(value) for key, value in metrics.items()}
    nonfinite = [key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
    plain |= dict.fromkeys(nonfinite)
    if nonfinite:
        plain[NONFINITE_KEY] = nonfinite
    return json.dumps(plain, allow_nan=False)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash tore is left out, as is any that is no JSON object."""
    return [json.loads(line) for line in _whole_lines(Path(path))]


def keep_steps(path: Path, last_step: int) -> None:
    """Cut a metrics file down to the lines of steps up to `last_step`, and drop torn lines; the file is replaced whole.

    A run that goes on from a checkpoint repeats the steps after it, which would stand there twice.
    """
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line).get("step", 0) <= last_step]
    text = "".join(f"{line}\n" for line in kept) if last_step > 0 else ""
    replace_file(path, text.encode())


def _whole_lines(path: Path) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if isinstance(json.loads(line), dict):
                lines.append(line)
        except json.JSONDecodeError:
            continue
    return lines


def _plain(value: Any) -> Any:
    """Numbers of array libraries become Python's own."""
    return value.item() if hasattr(value, "item") else value


def format_line(metrics: Mapping[str, Any], *, num_steps: int | None = None) -> str:
    """One readable line: what is in `metrics`, in fixed order and width so that columns stand under each other."""
    step = metrics.get("step", 0)
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}" if num_steps else f"step {step}"]
    for key, label, show in _COLUMNS:
        value = _plain(metrics.get(key))
        if value is not None:
            parts.append(f"{label} {show(value)}")
    return " | ".join(parts)


def _number(digits: int, width: int):
    return lambda value: f"{value:{width}.{digits}f}"


def _short(value: float) -> str:
    """1234567 -> 1.23M, at most five characters."""
    if not math.isfinite(value):
        return str(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}" if abs(value) < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.3g}"


def _perplexity(value: float) -> str:
    return f"{value:8.2f}" if value < 1e5 else f"{value:8.2e}"


_COLUMNS = (
    ("loss", "loss", _number(4, 7)),
    ("perplexity", "ppl", _perplexity),
    ("valid_loss", "valid loss", _number(4, 7)),
    ("valid_perplexity", "valid ppl", _perplexity),
    ("valid_accuracy", "valid accuracy", lambda value: f"{value:6.2%}"),
    ("test_loss", "test loss", _number(4, 7)),
    ("test_perplexity", "test ppl", _perplexity),
    ("lr", "lr", lambda value: f"{value:.2e}"),
    ("grad_norm", "grad norm", _number(3, 6)),
    ("tokens_per_second", "tokens/s", lambda value: f"{_short(value):>5}"),
    ("flops_utilization", "util", lambda value: f"{value:5.1%}"),
    ("aux_loss", "aux", _number(4, 6)),
    ("dropped_fraction", "dropped", lambda value: f"{value:5.1%}"),
    ("expert_load_max_over_mean", "load max/mean", _number(2, 4)),
    ("unused_experts", "unused", str),
    ("dead_experts", "dead", str),
    ("skipped_steps", "skipped", str),
    ("loss_scale", "scale", lambda value: f"{value:g}"),
    ("memory_bytes", "memory", lambda value: f"{value / 2**30:.2f} GiB"),
)


class ProgressBar:
    """A bar on the terminal's last line that counts steps; draws nothing where the stream is no terminal.

    Text that is to stay goes through `print`, which lifts the bar out of its way.
    """

    def __init__(self, num_steps: int, *, first_step: int = 0, stream: TextIO | None = None, enabled: bool = True):
        self.num_steps = max(num_steps, 1)
        self.step = self.first_step = first_step
        self._stream = stream if stream is not None else sys.stdout
        self._enabled = enabled and self._stream.isatty()
        self._started = time.monotonic()
        self._drawn = 0.0
        self._width = 0

    def update(self, step: int) -> None:
        """`step` steps of the run are done."""
        self.step = step
        now = time.monotonic()
        if self._enabled and (now - self._drawn >= BAR_INTERVAL_SECONDS or step >= self.num_steps):
            self._drawn = now
            self._draw()

    def print(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self._erase()
        print(text, file=self._stream, flush=True)
        if self._enabled and self.step < self.num_steps:
            self._draw()

    def close(self) -> None:
        """Take the bar away."""
        self._erase()
        self._enabled = False

    def _draw(self) -> None:
        share = min(self.step / self.num_steps, 1.0)
        filled = round(BAR_WIDTH * share)
        text = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {self.step}/{self.num_steps} {share:4.0%}"
        num_done = self.step - self.first_step
        if num_done > 0:
            seconds = (time.monotonic() - self._started) / num_done
            text += f"  {seconds:.2f} s/step  {_duration(seconds * (self.num_steps - self.step))} left"
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def _erase(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
