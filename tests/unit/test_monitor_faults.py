"""Rank 0's voice where its files cannot be written, or something else speaks to it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.config import load_config
from megamoe.errors import ConfigError
from megamoe.sinks import tracker as tracker_module
from megamoe.sinks.specs import NICENESS_VARIABLE, niceness
from megamoe.training.monitor import Monitor

ROOT = Path(__file__).parents[2]


def test_a_full_disk_costs_lines_and_not_the_training(tmp_path, capsys):
    monitor = Monitor(load_config("laptop-moe", [f"run.dir={tmp_path}"]), is_first=True, resume_step=0)
    usual = monitor._log, monitor._metrics._file, monitor._loads._file
    monitor._log, monitor._metrics._file, monitor._loads._file = (open("/dev/full", "a") for _ in range(3))  # noqa: SIM115
    for step in (1, 2):
        monitor.record_loads(step, {1: [1.0]})
        monitor.record({"step": step, "loss": 2.0})
    monitor.note("save_failed", "the disk is full")
    monitor.close()
    for file in usual:
        file.close()
    lines = capsys.readouterr().out.splitlines()
    for name in ("log.txt", "metrics.jsonl", "expert_loads.jsonl"):
        told = f"{tmp_path}/{name} cannot be written (No space left on device): training goes on"
        assert lines.count(told) == 1
    assert sum("loss" in line for line in lines) == 2 and "the disk is full" in lines
    assert json.loads((tmp_path / "events.jsonl").read_text())["kind"] == "save_failed"


def test_an_error_waits_for_no_service_and_stray_output_is_no_answer(tmp_path, monkeypatch):
    """A process that prints before it answers, and that does not end."""
    program = tmp_path / "megamoe_stub.py"
    program.write_text(
        "import sys, time\nprint('hello from a site hook')\nprint('[1]')\nprint('{\"ready\": true}', flush=True)\n"
        "sys.stdin.read()\nopen(sys.argv[1], 'w').close()\ntime.sleep(30)\n"
    )
    usual = tracker_module.subprocess.Popen

    def stub(words, **options):
        return usual([sys.executable, str(program), str(tmp_path / "heard")], **options)

    monkeypatch.setattr(tracker_module.subprocess, "Popen", stub)
    spec = {"service": "tensorboard", "run_dir": str(tmp_path), "close_seconds": 20.0, "events_position": 0}
    tracker = tracker_module.Tracker(spec, lambda text: None)
    until = time.monotonic() + 20
    while not tracker._is_ready:
        assert time.monotonic() < until
        tracker.look_after()
        time.sleep(0.02)
    tracker.let_go()
    while not (tmp_path / "heard").exists():
        assert time.monotonic() < until, "the process does not hear of the end"
        time.sleep(0.02)
    assert tracker._process.poll() is None, "it was not waited for"
    tracker._process.kill()
    tracker._process.wait()


def test_tracking_takes_what_is_left_with_all_that_it_starts(monkeypatch):
    """What it starts in a session of its own, as Weights & Biases does, is a scheduling group of its own."""
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this Linux does not group processes by session")
    monkeypatch.delenv(NICENESS_VARIABLE)
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom megamoe.sinks.process import step_back\n"
        "from megamoe.sinks.specs import niceness\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os.setsid()\n    time.sleep(60)\n"
        "time.sleep(0.3)\nstep_back(niceness())\n"
        "print(os.nice(0), *[Path(f'/proc/{each}/autogroup').read_text().split()[-1] for each in (os.getpid(), pid)])\n"
        "os.kill(pid, 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.split() == ["19", "19", "19"], done.stderr


def test_the_user_says_how_far_tracking_steps_back(monkeypatch):
    for text, expected in (("0", 0), ("7", 7), ("19", 19), ("", 19)):
        monkeypatch.setenv(NICENESS_VARIABLE, text)
        assert niceness() == expected
    for text in ("20", "-1", "much", "1.5"):
        monkeypatch.setenv(NICENESS_VARIABLE, text)
        with pytest.raises(ConfigError, match=f'is "{text}": use 0 .* to 19'):
            niceness()
