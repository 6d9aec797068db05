"""Weights & Biases slow, refusing, gone, killed, on a full disk: a run is not held up, loses nothing, and goes on."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megamoe.config import load_config
from megamoe.runs.metrics import read_metrics
from megamoe.sinks import tracker as module
from megamoe.training.monitor import Monitor
from tests.unit.wandb_cases import quiet, service, stored_runs

NUM_STEPS = 12
WAIT_SECONDS = 200.0
HELD_UP_SECONDS = 0.5  # in all steps; a service that were waited for would take seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    quiet(monkeypatch, tmp_path)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 60.0)


def monitor_of(run_dir: Path, mode: str = "online", *, resume_step: int = 0, timeout_seconds: float = 20) -> Monitor:
    run_dir.mkdir(exist_ok=True)
    overrides = [f"run.dir={run_dir}", "run.num_steps=20", f"monitor.wandb_mode={mode}",
                 f"monitor.wandb_timeout_seconds={timeout_seconds}"]  # fmt: skip
    return Monitor(load_config("laptop-moe", overrides), is_first=True, resume_step=resume_step)


def record(monitor: Monitor, first: int, last: int) -> float:
    """Record steps; the seconds that training would have waited for it."""
    spent = 0.0
    for step in range(first, last + 1):
        began = time.perf_counter()
        monitor.record({"step": step, "loss": 1.0 / step})
        spent += time.perf_counter() - began
        time.sleep(0.02)
    return spent


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def is_ready(monitor: Monitor) -> bool:
    """Whether the service's process is at work."""
    monitor.show_step(1)
    monitor._look_after_trackers()
    return monitor._trackers[0]._is_ready


def core_of(monitor: Monitor) -> int:
    """The process id of wandb-core under the process that feeds it."""
    feeder = monitor._trackers[0]._process.pid
    command = ["ps", "-o", "pid=,args=", "--ppid", str(feeder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(int(line.split()[0]) for line in lines if "wandb-core" in line)


def assert_nothing_is_lost(run_dir: Path, num_steps: int = NUM_STEPS) -> None:
    """Every step once in metrics.jsonl, and once, in order, in the files that `wandb sync` takes."""
    expected = list(range(1, num_steps + 1))
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == expected
    runs = stored_runs(run_dir)
    assert len({each.run.run_id for each in runs if each.history}) == 1
    assert [step for each in runs for step in each.steps] == expected


def test_a_healthy_service_gets_every_step_and_a_resumed_run_goes_on_there(monkeypatch, tmp_path):
    """The service dropped out of an attempt: what it lacks is made up for by the next one, from the run's own files."""
    with service(monkeypatch) as server:
        monkeypatch.setenv("MEGAMOE_TRACKER_NICENESS", "1")
        monitor = monitor_of(tmp_path / "run")
        assert record(monitor, 1, 6) < HELD_UP_SECONDS
        wait_for(lambda: is_ready(monitor), "a start")
        assert os.getpriority(os.PRIO_PROCESS, monitor._trackers[0]._process.pid) == max(1, os.nice(0))
        monitor.alert("Look", "here")
        monitor.close()
        (run_id,) = server.runs
        assert server.steps(run_id) == [1, 2, 3, 4, 5, 6] and server.alerts == ["Look"]
        del server.runs[run_id][4:]  # as if the service had been gone from step 5 on
        monitor = monitor_of(tmp_path / "run", resume_step=5)
        record(monitor, 6, NUM_STEPS)
        monitor.close()
        assert server.steps(run_id) == list(range(1, NUM_STEPS + 1))


@pytest.mark.parametrize("fault", ["refuses", "answers_500", "is_slow", "no_key"])
def test_a_service_that_is_out_of_order_at_the_start(monkeypatch, tmp_path, fault, capsys):
    with service(monkeypatch) as server:
        if fault == "refuses":
            server.cut()
        elif fault == "no_key":
            monkeypatch.delenv("WANDB_API_KEY")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        server.status = 500 if fault == "answers_500" else 200
        server.delay_seconds = 10.0 if fault == "is_slow" else 0.0
        monitor = monitor_of(tmp_path / "run", timeout_seconds=2)
        spent = record(monitor, 1, NUM_STEPS)
        wait_for(lambda: is_ready(monitor) and monitor._trackers[0].spec["mode"] == "offline", "going on offline")
        monitor.close()
    assert spent < HELD_UP_SECONDS, "training was held up"
    assert_nothing_is_lost(tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert len(said) == 1 and said[0].startswith("Weights & Biases is not reached: "), said
    assert said[0].endswith(". The run is offline: `wandb sync` sends it later")


@pytest.mark.parametrize("fault", ["is_cut", "answers_500", "is_slow"])
def test_a_service_that_breaks_while_training_goes_on(monkeypatch, tmp_path, fault):
    with service(monkeypatch) as server:
        monitor = monitor_of(tmp_path / "run", timeout_seconds=4)
        spent = record(monitor, 1, 4)
        wait_for(lambda: is_ready(monitor), "a start")
        if fault == "is_cut":
            server.cut()
        server.status = 500 if fault == "answers_500" else 200
        server.delay_seconds = 10.0 if fault == "is_slow" else 0.0
        spent += record(monitor, 5, NUM_STEPS)
        began = time.monotonic()
        monitor.close()
        assert time.monotonic() - began < 4 + module.CLOSE_SECONDS, "the end is bounded"
        assert spent < HELD_UP_SECONDS, "training was held up"
        assert_nothing_is_lost(tmp_path / "run")


@pytest.mark.parametrize("victim", ["core", "feeder"])
def test_a_killed_process_is_started_again_and_loses_no_row(tmp_path, victim, capsys):
    monitor = monitor_of(tmp_path / "run", "offline")
    spent = record(monitor, 1, 4)
    wait_for(lambda: is_ready(monitor), "a start")
    os.kill(core_of(monitor) if victim == "core" else monitor._trackers[0]._process.pid, signal.SIGKILL)
    spent += record(monitor, 5, 8)
    wait_for(lambda: is_ready(monitor) and monitor._trackers[0]._num_failures == 1, "another start")
    spent += record(monitor, 9, NUM_STEPS)
    monitor.close()
    assert spent < HELD_UP_SECONDS
    assert_nothing_is_lost(tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert len(said) == 1 and "Weights & Biases failed and is started again: " in said[0]


def test_a_run_whose_process_is_killed_leaves_what_it_has_recorded(tmp_path):
    """Its feeder sees the end of its input, writes out everything, and goes; the next attempt continues behind it."""
    monitor = monitor_of(tmp_path / "run", "offline")
    record(monitor, 1, 7)
    feeder = monitor._trackers[0]._process
    for number in module.HEEDLESS_OF:
        feeder.send_signal(number)  # as slurm does to all processes of a step
    feeder.stdin.close()  # what the death of its parent does
    assert feeder.wait(WAIT_SECONDS) == 0
    monitor = monitor_of(tmp_path / "run", "offline", resume_step=4)
    record(monitor, 5, NUM_STEPS)
    monitor.close()
    assert_nothing_is_lost(tmp_path / "run")


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 1 MB. Skips where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems may not be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("when", ["at_start", "later"])
def test_a_full_disk_under_wandb_costs_no_metrics(monkeypatch, tmp_path, when, capsys):
    with small_disk(tmp_path / "disk"):
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "disk"))
        monkeypatch.setattr(module, "MAX_FAILURES", 1)

        def fill() -> None:
            with contextlib.suppress(OSError), open(tmp_path / "disk" / "full", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        if when == "at_start":
            fill()
        monitor = monitor_of(tmp_path / "run", "offline")
        spent = record(monitor, 1, 4)
        if when == "later":
            wait_for(lambda: is_ready(monitor), "a start")
            fill()
        spent += record(monitor, 5, NUM_STEPS)
        monitor.close()
    assert spent < HELD_UP_SECONDS
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert said and "Metrics" in said[-1], said
