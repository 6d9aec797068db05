"""SIGTERM and SIGUSR1 through `megamoe train`: the step ends, its checkpoint is whole, the exit code is its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.checkpoint.reader import Checkpoint
from megamoe.runs.metrics import read_metrics
from megamoe.runs.run_folder import resumable_checkpoints
from tests.parallel.test_run import config_of, corpus  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
INTERRUPTED = 75
START_SECONDS = 120.0
MANY_STEPS = 1_000_000


def start(config_path: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megamoe", "train", str(config_path), "--local-ranks", "2", *overrides]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def newest_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while newest_step(run_dir) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks: the launcher's child is the server, whose children they are."""

    def children(pid: int) -> list[int]:
        text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
        return [int(word) for word in text.stdout.split()]

    return [rank for server in children(process.pid) for rank in children(server)]


def end_of(process: subprocess.Popen, run_dir: Path) -> tuple[int, str, int]:
    """Exit code, output, and the step of the checkpoint in force, which is whole and of the last step that was run."""
    output, _ = process.communicate(timeout=60)
    folder = resumable_checkpoints(run_dir)[0]
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.verify()
        assert checkpoint.manifest.step == newest_step(run_dir)
        return process.returncode, output, checkpoint.manifest.step


@pytest.mark.timeout(400)
def test_signals_save_and_end_the_run_which_then_goes_on(corpus, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    settings = config_of(corpus, run_dir, f"run.num_steps={MANY_STEPS}", "run.eval_interval_steps=0")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))  # JSON is YAML

    process = start(path, "checkpoint.save_interval_steps=0")
    wait_for_step(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # SLURM and others repeat themselves
    code, output, first = end_of(process, run_dir)
    assert code == INTERRUPTED and first >= 5, output
    assert f"megamoe: stopped by a signal after step {first}, whose checkpoint is in {run_dir}/checkpoints" in output
    assert "error" not in output and "Traceback" not in output

    process = start(path, "checkpoint.save_interval_steps=7")
    wait_for_step(process, run_dir, first + 10)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)  # one rank alone has heard it
    code, output, second = end_of(process, run_dir)
    assert code == INTERRUPTED and second >= first + 10, output
    assert f"resumed at step {first} of {MANY_STEPS}" in output

    process = start(path, f"run.num_steps={second + 2}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resumed at step {second} of {second + 2}" in output, output
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line] == list(
        range(1, second + 3)
    )


@pytest.mark.timeout(200)
def test_a_rank_that_does_not_stop_is_killed_in_the_end(tmp_path):
    """The launcher's patience with a forwarded signal is bounded."""
    program = (
        "from megamoe.launch.local import run_local\nimport sys\n"
        f"sys.exit(run_local('tests.unit.launch_entries:ignores_termination', {{'folder': {str(tmp_path)!r}}}, "
        "num_ranks=2, stop_seconds=1.0).exit_code)"
    )
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert 0.9 < time.monotonic() - began < 10
