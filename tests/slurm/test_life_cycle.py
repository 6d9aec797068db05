"""`megamoe submit` on a real SLURM: runs that are cut off go on by themselves and end as if nothing had been.

The job that waits for its time limit is submitted first and looked at last: the others run meanwhile. What a run must
end with is what an uninterrupted one on as many ranks ended with: `whole` on 2 x 2, the array's first on 2 x 1.
"""

import json
import re
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.runs.attempts import read_attempts
from megamoe.runs.metrics import read_metrics
from megamoe.runs.run_folder import resumable_checkpoints
from tests.slurm.conftest import NUM_STEPS, Site
from tests.unit.wandb_cases import stored_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WHOLE = "it's 100% \"whole\""  # a run's name that has to survive sbatch, bash and srun
ALL_STEPS = list(range(1, NUM_STEPS + 1))
HELD_STEP = 4
TRACKED = ("WANDB_MODE=offline", "WANDB_SILENT=true", "WANDB_DISABLE_GIT=true", "WANDB_X_DISABLE_STATS=true",
           "MEGAMOE_TRACKER_NICENESS=0")  # fmt: skip


@pytest.fixture(scope="module")
def limited(site: Site) -> str:
    """A job that trains four steps and then waits until SLURM says that its time is over; 90 to 120 s from now."""
    site.hold("limited", HELD_STEP)
    tracked = [part for variable in TRACKED for part in ("--env", variable)]
    return site.submit(
        "limited", "--time", "3", "--signal-seconds", "59", "restart.max_attempts_without_progress=9", *tracked,
        ranks_per_node=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stubborn(site: Site) -> str:
    """A job whose ranks do not heed the signal before its time limit, in its first attempt."""
    body = "[ \"$MEGAMOE_ATTEMPT\" = 2 ] && exit 0; trap '' TERM USR1; while :; do sleep 0.5; done"
    python = site.python("stubborn", "train", body)
    return site.submit(
        "stubborn", "--python", python, "--partition", "strict", "--time", "2", "--signal-seconds", "1"
    )


@pytest.fixture(scope="module")
def whole(site: Site, stubborn: str, limited: str) -> str:
    """A run that nothing interrupts."""
    job_id = site.submit(WHOLE, "--gpus-per-node", "2", "run.device=cpu", ranks_per_node=2)
    assert site.end(WHOLE, job_id) == "COMPLETED"
    return WHOLE


@pytest.fixture(scope="module")
def array(site: Site, limited: str) -> tuple[str, str]:
    """Two runs of one job, the second a shorter one with another learning rate."""
    names = ("array-a", "array b")
    configs = []
    for name, lr in zip(names, (0.01, 0.02), strict=True):
        settings = json.loads(site.config.read_text())
        settings["run"]["dir"], settings["optimizer"]["lr"] = name, lr
        configs.append(site.folder / f"{name}.yaml")
        configs[-1].write_text(json.dumps(settings))
    job_id = site.submitted(*map(str, configs), "--nodes", "2", "--ranks-per-node", "1")
    site.lab.wait_for_end(job_id)
    for part, name in enumerate(names):
        assert site.steps(name) == ALL_STEPS, site.output(name)
        assert (site.folder / name / "slurm" / f"job-{job_id}_{part}.out").exists()
    return names


def assert_equal_runs(site: Site, whole: str, name: str) -> None:
    """The same steps with the same losses, and the last checkpoints equal to the bit."""
    assert site.steps(name) == ALL_STEPS
    paths = [str(site.folder / each) for each in (whole, name)]
    assert main(["checkpoint", "diff", *paths]) == 0
    losses = [[line["loss"] for line in read_metrics(Path(path) / "metrics.jsonl")] for path in paths]
    assert losses[0] == losses[1]


def test_a_job_trains_to_the_end(site, whole):
    assert site.steps(whole) == ALL_STEPS
    output = site.output(whole)
    assert "tensor 2 x data 2" in output and "attempt 1 ended with exit code 0: stop done" in output
    (attempt,) = read_attempts(site.folder / whole)
    assert attempt.hosts == ("mmlab1", "mmlab2") and attempt.verdict == "stop"
    assert (site.folder / whole / "slurm" / "job.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=")


def test_a_complete_run_is_not_submitted_again(site, whole, capsys):
    assert main(["submit", str(site.config), f"run.dir={whole}", "--ranks-per-node", "4"]) == 2
    assert f"is complete: step {NUM_STEPS} of {NUM_STEPS}" in capsys.readouterr().err


def test_two_jobs_do_not_train_one_run(site, limited, capsys):
    arguments = ["submit", str(site.config), "run.dir=limited", "--ranks-per-node", "4"]
    assert main(arguments) == 2
    assert re.search(rf"job {limited} of \S+/limited is (RUNNING|PENDING): scancel it first", capsys.readouterr().err)


def test_an_array_trains_several_runs(site, array):
    losses = [[line["loss"] for line in read_metrics(site.folder / name / "metrics.jsonl")] for name in array]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]
    assert "tensor 1 x data 2" in site.output(array[1])


def test_a_cancelled_job_saves_and_does_not_come_back(site, array):
    site.hold("cancelled", HELD_STEP)
    job_id = site.submit("cancelled")
    site.wait_for_step("cancelled", HELD_STEP)
    site.lab.command("scancel", job_id)
    site.wait_for_signal("cancelled")
    site.release("cancelled")
    assert site.end("cancelled", job_id) == "CANCELLED"
    assert resumable_checkpoints(site.folder / "cancelled")[0].name == f"step_{HELD_STEP + 1:08}"
    assert site.lab.job(job_id)["Restarts"] == "0"


def test_a_node_that_dies_is_replaced(site, array):
    site.hold("bereft", HELD_STEP)
    job_id = site.submit("bereft", "--constraint", "shaky", "checkpoint.save_interval_steps=2")
    saved = site.folder / "bereft" / "checkpoints" / f"step_{HELD_STEP:08}"
    site.lab.wait_for(saved.exists, "the checkpoint of the fourth step", 400)
    lost = read_attempts(site.folder / "bereft")[0].hosts[1]  # not the one where the script runs
    site.lab.kill_node(lost)
    site.release("bereft")
    try:
        assert site.end("bereft", job_id) == "COMPLETED"
    finally:
        site.lab.start_node(lost)
    attempts = read_attempts(site.folder / "bereft")
    assert len(attempts) == 2 and lost not in attempts[1].hosts and attempts[1].step_before == HELD_STEP
    assert_equal_runs(site, array[0], "bereft")


def test_a_job_that_is_cut_off_at_its_time_limit_is_queued_again(site, stubborn):
    """SLURM kills ranks and script; attempts of that kind are counted by the next one."""
    assert site.end("stubborn", stubborn) == "COMPLETED"
    assert "cut off at its time limit and queued again" in site.output("stubborn")
    attempts = read_attempts(site.folder / "stubborn")
    assert [attempt.verdict for attempt in attempts][-1] == "stop" and len(attempts) == 2
    assert attempts[1].exit_code == 0 and attempts[1].restart_count == 1


def test_torchrun_is_interrupted_and_goes_on(site, array):
    """By the signal that SLURM sends to a batch script; torchrun's own exit code would be that of a failure."""
    site.hold("torchrun", HELD_STEP)
    job_id = site.submit("torchrun", "--launcher", "torchrun")
    site.wait_for_step("torchrun", HELD_STEP)
    site.lab.command("scancel", "--batch", "--signal=USR1", job_id)
    site.wait_for_signal("torchrun")
    assert "asked to stop" in site.output("torchrun")
    site.release("torchrun")
    assert site.end("torchrun", job_id) == "COMPLETED"
    attempts = read_attempts(site.folder / "torchrun")
    assert [attempt.exit_code for attempt in attempts] == [75, 0]
    assert attempts[1].step_before == HELD_STEP + 1
    assert_equal_runs(site, array[0], "torchrun")


def test_a_job_that_meets_its_time_limit_goes_on(site, whole, limited):
    """A machine that is so busy that the limit comes before the fourth step has more attempts to show."""
    site.wait_for_step("limited", HELD_STEP)
    number = len(read_attempts(site.folder / "limited"))
    site.wait_for_signal("limited")
    assert site.output("limited").count("asked to stop") == number
    assert site.steps("limited") == ALL_STEPS[:HELD_STEP]
    site.release("limited")
    assert site.end("limited", limited) == "COMPLETED"
    attempts = read_attempts(site.folder / "limited")
    assert [attempt.exit_code for attempt in attempts] == [75] * number + [0]
    assert [attempt.restart_count for attempt in attempts] == list(range(number + 1))
    assert [attempt.step_after for attempt in attempts[-2:]] == [HELD_STEP + 1, NUM_STEPS]
    assert f"resumed at step {HELD_STEP + 1} of {NUM_STEPS}" in site.output("limited")
    assert_equal_runs(site, whole, "limited")
    stored = [each for each in stored_runs(site.folder / "limited") if each.history]
    assert len(stored) >= 2
    assert {each.run.run_id for each in stored} == {(site.folder / "limited" / "wandb_run_id").read_text().strip()}
    assert [step for each in stored for step in each.steps] == ALL_STEPS
