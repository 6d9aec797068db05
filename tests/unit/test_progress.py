"""A status line: one line that rewrites itself on a terminal, plain lines at long intervals elsewhere."""

import io
import sys

import pytest

from megamoe import progress
from megamoe.progress import ByteProgress, StatusLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_one_line_that_leaves_no_trace(clock):
    stream = Terminal()
    line = StatusLine(stream)
    assert not line.is_due
    clock[0] += 0.2
    assert line.is_due
    line.show("a long text")
    assert not line.is_due
    line.show("short")
    line.end()
    assert stream.getvalue() == "\ra long text\rshort      \r     \r"
    line.end()
    assert stream.getvalue().endswith("\r     \r"), "there is nothing left to take away"


def test_the_last_message_takes_the_place_of_the_line(clock):
    stream = Terminal()
    line = StatusLine(stream)
    line.show("working")
    line.end("done")
    assert stream.getvalue() == "\rworking\rdone   \n"


def test_a_file_gets_a_plain_line_now_and_then(clock):
    stream = io.StringIO()
    line = StatusLine(stream)
    clock[0] += 9.9
    assert not line.is_due
    clock[0] += 0.1
    assert line.is_due
    line.show("half")
    line.end()
    line.end("done")
    assert stream.getvalue() == "half\ndone\n"


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "text"),
    [
        (250, 1.0, "copying  25%  0 MB/s  0:03 left"),
        (10**9, 100.0, "copying 100%  10 MB/s  0:00 left"),
        (10**9, 7200.0, "copying  25%  0 MB/s  6:00:00 left"),
    ],
)
def test_bytes_have_a_share_a_speed_and_a_time_left(clock, monkeypatch, num_bytes, seconds, text):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = ByteProgress("copying", 4 * num_bytes if "25%" in text else num_bytes)
    shown.add(2 * num_bytes)
    shown.add(-num_bytes)  # to be done again
    assert stream.getvalue() == ""
    clock[0] += seconds
    shown.add(0)
    assert stream.getvalue() == f"\r{text}"
    shown.finish()
    assert stream.getvalue() == f"\r{text}\r{' ' * len(text)}\r"
