"""Rank 0's voice where its files cannot be written, or something else speaks to it."""

import json
import os
import sys
import time

from megamoe.config import load_config
from megamoe.sinks import tracker as tracker_module
from megamoe.sinks.process import step_back
from megamoe.training.monitor import Monitor


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


def test_tracking_takes_what_is_left():
    child = os.fork()
    if child == 0:
        os.setsid()
        step_back()
        os._exit(os.nice(0))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 19
