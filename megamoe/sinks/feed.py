"""From the files of a run to one tracking service: what a sink is, and what it is given when."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megamoe.runs.events import EVENTS_FILE
from megamoe.runs.metrics import EXPERT_LOADS_FILE, METRICS_FILE, NONFINITE_KEY
from megamoe.sinks.tail import Tail

Values = Mapping[str, float]  # by key of metrics.jsonl, finite; NONFINITE_COUNT says how many were not
Loads = Mapping[int, Sequence[float]]  # layer -> tokens of each expert

NONFINITE_COUNT = "num_nonfinite_values"  # nan among a curve's values would be the least and the mean of them all

# Events that a service is told of: title and level (INFO, WARN, ERROR).
ALERTS = {
    "hang": ("A rank hangs", "ERROR"),
    "failed": ("A rank failed", "ERROR"),
    "divergence": ("The loss diverges", "ERROR"),
    "give_up": ("No further attempt", "ERROR"),
    "spike": ("Loss spike", "WARN"),
    "roll_back": ("Rolled back", "WARN"),
    "save_failed": ("A checkpoint was not saved", "WARN"),
    "interrupted": ("Interrupted, state saved", "INFO"),
    "requeue": ("Queued again", "INFO"),
}
# Of these nobody was left to tell, in the attempt that they ended: the next one does.
LATE = ("hang", "failed", "requeue", "give_up")


class Sink(Protocol):
    """One tracking service. Whatever it raises ends its process: see `megamoe.sinks.tracker`."""

    held_step: int  # the last step that it holds already, from attempts before: no more is written up to there
    takes_repeats: bool  # whether steps may be written again after a roll-back; else the first values stand

    def write(self, step: int, values: Values) -> None: ...

    def write_loads(self, step: int, loads: Loads) -> None: ...

    def alert(self, title: str, text: str, level: str) -> None: ...

    def saved(self, event: Mapping[str, Any]) -> None:
        """A checkpoint was saved: `event` is as in `megamoe.runs.events`."""
        ...

    def begin_anew(self) -> None:
        """What was written is void: all steps are written again."""
        ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Feed:
    """Gives a sink whatever the run's files hold beyond what the sink holds."""

    def __init__(self, run_dir: str, sink: Sink, *, events_position: int = 0, tells_late: bool = False) -> None:
        """Events are told from `events_position` (bytes) on; with `tells_late` also LATE ones of the attempt before."""
        folder = Path(run_dir)
        self.sink, self.last_step = sink, sink.held_step
        self._metrics, self._loads = Tail(folder / METRICS_FILE), Tail(folder / EXPERT_LOADS_FILE)
        self._events = Tail(folder / EVENTS_FILE, position=events_position)
        if tells_late:
            for event in _last_attempt(folder / EVENTS_FILE, events_position):
                if event.get("kind") in LATE:
                    self._tell(event)

    @property
    def events_position(self) -> int:
        """Up to where events have been told."""
        return self._events.position

    def pump(self) -> None:
        """Write what has come since the last call, in the order of steps."""
        replaced = [self._metrics.is_replaced(), self._loads.is_replaced()]
        if any(replaced) and self.sink.takes_repeats:
            self.sink.begin_anew()
            self._metrics, self._loads = Tail(self._metrics.path), Tail(self._loads.path)
            self.last_step = -1
        elif any(replaced):
            self.sink.held_step = self.last_step
        # Loads are written before the metrics of their step and are looked for after them: none comes too late.
        streams = (_by_step(self._metrics), _by_step(self._loads))
        for step, line in heapq.merge(*streams, key=lambda pair: pair[0]):
            if step > self.sink.held_step:
                self._write(step, line)
        for event in self._events.lines():
            self._tell(event)
        self.sink.flush()

    def _write(self, step: int, line: Mapping[str, Any]) -> None:
        self.last_step = max(step, self.last_step)
        layers = line.get("layers")
        if isinstance(layers, dict):
            self.sink.write_loads(step, {int(layer): counts for layer, counts in layers.items()})
            return
        lost = line.get(NONFINITE_KEY) or ()
        # Services put down the time themselves.
        values = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "time"}
        if lost:
            values[NONFINITE_COUNT] = len(lost)
        self.sink.write(step, values)

    def _tell(self, event: Mapping[str, Any]) -> None:
        kind, text = event.get("kind"), str(event.get("message", ""))
        if kind == "save":
            self.sink.saved(event)
        elif kind == "alert":
            self.sink.alert(str(event.get("title", "Alert")), text, str(event.get("level", "INFO")))
        elif kind in ALERTS:
            title, level = ALERTS[kind]
            self.sink.alert(title, text, level)


def _by_step(tail: Tail) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in tail.lines():
        if isinstance(line.get("step"), int):
            yield line["step"], line


def _last_attempt(path: Path, end: int) -> list[dict[str, Any]]:
    """The events since training last began, of the first `end` bytes of the file."""
    tail, events = Tail(path), []
    for event in tail.lines():
        if tail.position > end:
            break
        if event.get("kind") == "start":
            events = []
        events.append(event)
    return events
