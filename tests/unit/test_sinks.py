"""What a tracking service is given, and when: the files of a run, followed; names; what is skipped and what is told."""

import json

import pytest

from megamoe.runs.events import append_event
from megamoe.runs.metrics import MetricsWriter, keep_steps
from megamoe.sinks.feed import Feed
from megamoe.sinks.names import name_of
from megamoe.sinks.tail import Tail
from megamoe.sinks.wandb_sink import MOST_BARS, merged


class ListSink:
    """Keeps what it is given."""

    def __init__(self, held_step=-1, takes_repeats=False):
        self.held_step, self.takes_repeats = held_step, takes_repeats
        self.rows, self.alerts, self.saves = [], [], []

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def write_loads(self, step, loads):
        self.rows.append((step, dict(loads)))

    def alert(self, title, text, level):
        self.alerts.append((title, text, level))

    def saved(self, event):
        self.saves.append(event["step"])

    def begin_anew(self):
        self.rows.append("anew")
        self.held_step = -1

    def flush(self):
        pass

    def close(self):
        pass


def steps_of(sink):
    return [row if isinstance(row, str) else row[0] for row in sink.rows]


def test_a_tail_gives_each_whole_line_once(tmp_path):
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert list(tail.lines()) == [] and not tail.is_replaced()
    path.write_text('{"a": 1}\nnonsense\n[2]\n{"a": 3')
    assert list(tail.lines()) == [{"a": 1}]
    with open(path, "a") as file:
        file.write("0}\n")
    assert list(tail.lines()) == [{"a": 30}]
    assert list(tail.lines()) == [] and not tail.is_replaced()
    path.write_bytes(b"\xff\xfe\n" + b'{"a": 4}\n')  # shorter than what was read
    assert tail.is_replaced()
    assert list(tail.lines()) == [{"a": 4}]


def test_rows_come_in_the_order_of_steps_with_their_loads(tmp_path):
    metrics, loads = MetricsWriter(tmp_path), MetricsWriter(tmp_path, name="expert_loads.jsonl")
    sink = ListSink()
    feed = Feed(str(tmp_path), sink)
    feed.pump()
    loads.write({"step": 2, "layers": {"1": [4, 0]}})
    for line in ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "valid_loss": 1.25}, {"step": 3}):
        metrics.write(line)
    feed.pump()
    assert sorted(steps_of(sink)) == steps_of(sink) == [1, 2, 2, 2, 3]
    assert (2, {1: [4, 0]}) in sink.rows and (2, {"step": 2, "valid_loss": 1.25}) in sink.rows
    feed.pump()
    assert len(sink.rows) == 5


def test_what_a_service_holds_is_not_written_again_and_what_it_lacks_is(tmp_path):
    """The rows that a killed process lost, and only those, come from the file."""
    metrics = MetricsWriter(tmp_path)
    for step in range(1, 11):
        metrics.write({"step": step})
    sink = ListSink(held_step=7)
    Feed(str(tmp_path), sink).pump()
    assert steps_of(sink) == [8, 9, 10]


@pytest.mark.parametrize("takes_repeats", [False, True])
def test_steps_that_are_cut_off_and_run_again(tmp_path, takes_repeats):
    metrics = MetricsWriter(tmp_path)
    for step in range(1, 7):
        metrics.write({"step": step, "round": 1})
    sink = ListSink(takes_repeats=takes_repeats)
    feed = Feed(str(tmp_path), sink)
    feed.pump()
    metrics.close()
    keep_steps(tmp_path / "metrics.jsonl", 4)
    again = MetricsWriter(tmp_path, resume_step=4)
    for step in (5, 6, 7):
        again.write({"step": step, "round": 2})
    feed.pump()
    if takes_repeats:
        assert steps_of(sink) == [1, 2, 3, 4, 5, 6, "anew", 1, 2, 3, 4, 5, 6, 7]
    else:
        assert steps_of(sink) == [1, 2, 3, 4, 5, 6, 7], "what a service was told first stands"


def test_values_that_are_no_numbers_are_counted_not_drawn(tmp_path):
    metrics, sink = MetricsWriter(tmp_path), ListSink()
    metrics.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5, "note": "text"})
    Feed(str(tmp_path), sink).pump()
    assert sink.rows == [(1, {"step": 1, "lr": 0.5, "num_nonfinite_values": 2})]


def test_events_are_told_once_and_late_ones_by_the_next_attempt(tmp_path):
    append_event(tmp_path, "start", "first")
    append_event(tmp_path, "failed", "long ago")
    append_event(tmp_path, "start", "second")
    append_event(tmp_path, "spike", "was told then")
    append_event(tmp_path, "hang", "rank 3 stands still")
    position = (tmp_path / "events.jsonl").stat().st_size
    append_event(tmp_path, "start", "third")
    append_event(tmp_path, "alert", "look", title="Mine", level="ERROR")
    sink = ListSink()
    feed = Feed(str(tmp_path), sink, events_position=position, tells_late=True)
    assert sink.alerts == [("A rank hangs", "rank 3 stands still", "ERROR")]
    feed.pump()
    append_event(tmp_path, "save", "saved", step=20)
    append_event(tmp_path, "interrupted", "by a signal", step=21)
    feed.pump()
    assert sink.alerts[1:] == [("Mine", "look", "ERROR"), ("Interrupted, state saved", "by a signal", "INFO")]
    assert sink.saves == [20]
    again = ListSink()
    Feed(str(tmp_path), again, events_position=feed.events_position).pump()
    assert again.alerts == [] and again.saves == []


@pytest.mark.parametrize(
    ("key", "name", "summary"),
    [
        ("loss", "train/loss", "min"),
        ("seconds_all_to_all", "time/all_to_all_seconds", "mean"),
        ("valid_loss/books", "valid/loss/books", "min"),
        ("test_perplexity/my.corpus-2", "test/perplexity/my.corpus-2", "min"),
        ("memory_bytes", "memory/peak_bytes", "max"),
        ("step", "step", "max"),
        ("something_new", "other/something_new", "last"),
    ],
)
def test_names_are_grouped_and_have_units(key, name, summary):
    assert name_of(key) == (name, summary)


@pytest.mark.parametrize("num_experts", [1, 8, MOST_BARS, MOST_BARS + 1, 3000])
def test_a_heat_map_has_no_more_bars_than_the_service_draws(num_experts):
    bars = merged(list(range(num_experts)), MOST_BARS)
    assert len(bars) <= MOST_BARS and sum(bars) == sum(range(num_experts))
    assert num_experts > MOST_BARS or bars == list(range(num_experts))


def test_lines_stay_valid_json(tmp_path):
    MetricsWriter(tmp_path).write({"step": 1, "loss": float("-inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "nonfinite": ["loss"]}
