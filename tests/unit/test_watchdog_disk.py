"""A file system that hangs keeps no rank alive: what is written when one is ended is written within a time."""

import threading
import time

import pytest

from megamoe.config import load_config
from megamoe.launch.environment import rank_environment
from megamoe.training import supervision as module
from megamoe.watchdog import stacks
from megamoe.watchdog.bounded import within
from megamoe.watchdog.judge import Verdict


@pytest.fixture
def hangs():
    """Something that does not come back before the test is over."""
    over = threading.Event()
    yield lambda *_, **__: over.wait(60)
    over.set()


def test_what_is_done_in_time_is_done(hangs):
    done = []
    assert within(5.0, lambda: done.append(1)) and done == [1]
    began = time.monotonic()
    assert not within(0.2, hangs)
    assert 0.2 <= time.monotonic() - began < 5.0


def test_stacks_are_on_disk_and_a_disk_that_hangs_is_left(tmp_path, hangs, monkeypatch):
    file = stacks.StackFile(tmp_path / "stacks" / "rank_0.txt")
    file.write("first look")
    text = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert text.startswith("first look\n\n") and "test_stacks_are_on_disk" in text and "MainThread" in text
    monkeypatch.setattr(stacks, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(file, "_append", hangs)
    began = time.monotonic()
    file.write("second look")
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("kind", ["hang", "died"])
def test_a_rank_is_ended_whether_the_disk_takes_why_or_not(kind, tmp_path, hangs, monkeypatch):
    config = load_config("laptop-moe", [f"run.dir={tmp_path}"])
    supervision = module.Supervision(config, rank_environment(), 1)
    ended = []
    monkeypatch.setattr(module, "RECORD_SECONDS", 0.2)
    monkeypatch.setattr(module.failures, "write_failure", hangs)

    def end(error: Exception, *, say: bool) -> None:
        ended.append((type(error).__name__, say))
        raise SystemExit

    monkeypatch.setattr(module, "end_process", end)
    with pytest.raises(SystemExit):
        supervision._end_for_verdict(Verdict(kind, 3, "host", 7, "save", "it stands still"))
    assert ended == [("TrainingHung" if kind == "hang" else "PeerLost", True)]
