"""TensorBoard's event files, in RUN/tensorboard."""

import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megamoe.sinks.feed import Loads, Values
from megamoe.sinks.names import STEP, load_name, load_peak_name, name_of

FOLDER = "tensorboard"


class TensorboardSink:
    """Event files of a run. A reader drops what later steps once wrote where a `start` says so."""

    takes_repeats = True

    def __init__(self, spec: Mapping[str, Any]) -> None:
        folder = Path(spec["run_dir"]) / FOLDER
        has_more = any(folder.glob("events.out.tfevents.*"))
        self.held_step = spec["resume_step"] if has_more else -1
        self._writer = EventFileWriter(str(folder))
        self._start(self.held_step + 1)

    def _start(self, step: int) -> None:
        self._writer.add_event(
            Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, values: Values) -> None:
        named = ((name_of(key).name, value) for key, value in values.items())
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in named if name != STEP])

    def write_loads(self, step: int, loads: Loads) -> None:
        """Of each layer a histogram over the numbers of its experts, and the fullest one's load over the mean."""
        found = []
        for layer, counts in loads.items():
            mean = sum(counts) / len(counts)
            peak = max(counts) / mean if mean else math.nan
            found += [Summary.Value(tag=load_name(layer), histo=_bars(counts)),
                      Summary.Value(tag=load_peak_name(layer), simple_value=peak)]  # fmt: skip
        self._add(step, found)

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def alert(self, title: str, text: str, level: str) -> None:
        pass  # there is nobody whom it could tell

    def saved(self, event: Mapping[str, Any]) -> None:
        pass

    def begin_anew(self) -> None:
        self.held_step = -1
        self._start(0)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _bars(counts: Any) -> HistogramProto:
    """Expert e's tokens as what lies between e and e + 1."""
    weighted = [(number + 0.5, count) for number, count in enumerate(counts)]
    return HistogramProto(
        min=0.0, max=float(len(counts)), num=float(sum(counts)),
        sum=sum(place * count for place, count in weighted),
        sum_squares=sum(place * place * count for place, count in weighted),
        bucket_limit=[float(number + 1) for number in range(len(counts))], bucket=list(itertools.chain(counts)),
    )  # fmt: skip
