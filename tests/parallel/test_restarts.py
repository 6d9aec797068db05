"""A rank is killed under `megamoe train --restarts`: the run goes on by itself from its newest checkpoint."""

import json
import os
import signal
import time

import pytest

from megamoe.runs.attempts import read_attempts
from megamoe.runs.events import read_events
from megamoe.runs.metrics import read_metrics
from megamoe.runs.run_folder import resumable_checkpoints
from tests.parallel.test_run import config_of, corpus  # noqa: F401 (a fixture)
from tests.parallel.test_signals import ranks_of, start, wait_for_step

NUM_STEPS = 80


@pytest.mark.timeout(300)
def test_a_killed_rank_costs_the_steps_since_the_last_save(corpus, tmp_path):  # noqa: F811
    run_dir, path = tmp_path / "run", tmp_path / "run.yaml"
    settings = config_of(corpus, run_dir, f"run.num_steps={NUM_STEPS}", "run.eval_interval_steps=0")
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    process = start(path, "checkpoint.save_interval_steps=5", "--restarts", "2")
    wait_for_step(process, run_dir, 12)
    while not resumable_checkpoints(run_dir):
        time.sleep(0.02)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "megamoe: ended by signal 9: starting again, 2 more at most" in output
    first, second = read_attempts(run_dir)
    assert (first.exit_code, first.verdict, second.exit_code, second.verdict) == (137, "requeue", 0, "stop")
    assert 5 <= first.step_after == second.step_before < second.step_after == NUM_STEPS
    assert f"resumed at step {first.step_after} of {NUM_STEPS}" in output
    lines = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    assert lines == list(range(1, NUM_STEPS + 1))  # none twice, none lost
    (event,) = [event for event in read_events(run_dir) if event["kind"] == "requeue"]
    assert (event["attempt"], event["excluded_hosts"]) == (1, [])
