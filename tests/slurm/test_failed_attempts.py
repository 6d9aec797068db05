"""What jobs do when attempts fail, seen on a real SLURM; nothing is trained, so that a job takes moments."""

import json

import pytest

from megamoe.cli import main
from megamoe.launch.environment import expand_node_list
from megamoe.runs.attempts import read_attempts
from tests.slurm.conftest import ROOT, Site

pytestmark = pytest.mark.timeout(600)


def config(site: Site, name: str) -> str:
    """A configuration file of its own with the run's folder in it."""
    settings = json.loads(site.config.read_text())
    settings["run"]["dir"] = name
    path = site.folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    return str(path)


def test_an_array_of_runs_that_fail_gives_each_of_them_up(site):
    """A defect is tried again; every part is queued again for itself, and its output goes on in its file."""
    names = ["defect-a", "defect-b"]
    python = site.python("defect", "train", "exit 1")
    job_id = site.submitted(
        *(config(site, name) for name in names), "--python", python, "--nodes", "2", "--ranks-per-node", "1",
        "restart.max_attempts_without_progress=2", "--max-attempts", "5",
    )  # fmt: skip
    site.lab.wait_for_end(job_id)
    for part, name in enumerate(names):
        job = site.lab.job(f"{job_id}_{part}")
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "1")
        attempts = read_attempts(site.folder / name)
        assert [attempt.verdict for attempt in attempts] == ["requeue", "stop"]
        assert [attempt.array_task for attempt in attempts] == [str(part)] * 2
        assert "attempt 2 ended with exit code 1: stop 2 attempts in a row left no checkpoint" in site.output(name)


def test_what_the_user_must_mend_is_not_tried_again(site):
    job_id = site.submit("to-mend", "--python", site.python("to-mend", "train", "exit 2"))
    assert site.end("to-mend", job_id) == "FAILED"
    assert site.lab.job(job_id)["ExitCode"] == "2:0"
    assert [attempt.verdict for attempt in read_attempts(site.folder / "to-mend")] == ["stop"]


def test_hosts_found_bad_are_left_out_beside_those_that_the_user_left_out(site):
    body = '[ "$MEGAMOE_ATTEMPT" = 1 ] && echo "requeue exclude=$(hostname)" || echo "stop done"'
    job_id = site.submitted(
        config(site, "picky"), "--python", site.python("picky", "after-attempt|train", body), "--ranks-per-node", "1",
        "--constraint", "shaky", "--exclude", "mmlab5", "parallel.expert_parallel_size=1",
    )  # fmt: skip
    site.lab.wait_for_end(job_id)
    first, second = read_attempts(site.folder / "picky")
    assert {*first.hosts, *second.hosts} == {"mmlab3", "mmlab4"}
    excluded = expand_node_list(site.lab.job(job_id)["ExcNodeList"])
    assert sorted(excluded) == sorted([*first.hosts, "mmlab5"])


@pytest.mark.slow
def test_torchruns_exit_code_does_not_hide_that_of_its_ranks(site):
    """Its own is 1, of a defect, which would be tried again."""
    job_id = site.submitted(
        config(site, "no-data"), "--launcher", "torchrun", "--ranks-per-node", "1", "--no-path-checks",
        "data.train=[{path: gone}]", "parallel.expert_parallel_size=1",
    )  # fmt: skip
    assert site.end("no-data", job_id) == "FAILED"
    assert site.lab.job(job_id)["ExitCode"] == "2:0"
    assert [(attempt.exit_code, attempt.verdict) for attempt in read_attempts(site.folder / "no-data")] == [(2, "stop")]


@pytest.mark.slow
def test_a_node_that_preflight_finds_bad_is_left_out(site):
    """On one node files may not grow, so that preflight cannot write into the run's folder from there."""
    bad = "mmlab4"
    body = f'[ "$(hostname)" = {bad} ] && ulimit -f 100; exec "{site.usual_python}" "$@"'
    python = site.python("preflight", "preflight", body, "train", "exit 0")
    job_id = site.submitted(
        config(site, "tested"), "--python", python, "--nodes", "2", "--ranks-per-node", "1", "--constraint", "shaky",
        "--preflight", "preflight.min_relative_compute=0", "preflight.min_relative_bandwidth=0",
    )  # fmt: skip
    assert site.end("tested", job_id) == "COMPLETED"
    first, second = read_attempts(site.folder / "tested")
    assert (first.exit_code, first.excluded_hosts) == (5, (bad,)) and bad in first.hosts
    assert second.exit_code == 0 and bad not in second.hosts


def test_without_requeue_the_exit_code_is_that_of_training(site):
    job_id = site.submit("once", "--no-requeue", "--python", site.python("once", "train", "exit 75"))
    assert site.end("once", job_id) == "FAILED"
    assert site.lab.job(job_id)["ExitCode"] == "75:0" and site.lab.job(job_id)["Restarts"] == "0"


def test_a_dry_run_asks_slurm(site, capsys):
    command = ["submit", config(site, "dry"), "--ranks-per-node", "1", "--cluster-settings", str(site.settings)]
    before = site.job_ids()
    assert main([*command, "--nodes", "2", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/bin/bash\n") and "to start at" in captured.err
    assert main([*command, "--nodes", "2", "--partition", "gpu", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megamoe: error: sbatch refused: invalid partition specified: gpu")
    assert error.count("\n") == 1
    assert site.job_ids() == before and not (site.folder / "dry").exists()


@pytest.mark.slow
def test_the_scripts_for_those_who_submit_themselves(site):
    """train.sbatch, convert.sbatch and evaluate.sbatch as they are shipped, from the root of the repository."""
    scripts = ROOT / "launch_scripts" / "slurm"
    common = ["sbatch", "--parsable", f"--chdir={ROOT}", "--constraint=steady", f"--output={site.folder}/plain-%j.out"]
    run = site.folder / "plain"
    job_id = site.lab.command(
        *common, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", str(scripts / "train.sbatch"),
        str(site.config), f"run.dir={run}", f"data.train=[{{path: {site.folder / 'text'}}}]", "run.num_steps=3",
        "run.device=cpu",
    )  # fmt: skip
    state = site.lab.wait_for_end(job_id)
    assert state == "COMPLETED", (site.folder / f"plain-{job_id}.out").read_text()
    assert site.steps("plain") == [1, 2, 3]
    options = ["--no-verify", "--no-tokenizer", "--drops-off"]
    job_id = site.lab.command(
        *common, str(scripts / "convert.sbatch"), "to-hf", str(run), str(site.folder / "converted"), *options
    )
    state = site.lab.wait_for_end(job_id)
    assert state == "COMPLETED", (site.folder / f"plain-{job_id}.out").read_text()
    assert (site.folder / "converted" / "config.json").exists()
    results = site.folder / "results.json"
    job_id = site.lab.command(
        *common, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", str(scripts / "evaluate.sbatch"), str(run),
        "--text", str(site.folder / "text"), "--out", str(results), "run.device=cpu", "parallel.expert_parallel_size=2",
    )  # fmt: skip
    state = site.lab.wait_for_end(job_id)
    assert state == "COMPLETED", (site.folder / f"plain-{job_id}.out").read_text()
    assert json.loads(results.read_text())["models"][0]["step"] == 3
    assert json.loads(results.read_text())["is_complete"]


def test_a_job_that_is_cancelled_does_not_come_back(site):
    """Although its ranks leave with the exit code of an interruption that is gone on from."""
    ready = site.folder / "ready"
    body = f"trap 'exit 75' TERM USR1; touch '{ready}'; while :; do sleep 0.2; done"
    job_id = site.submit("unwanted", "--python", site.python("unwanted", "train", body))
    site.lab.wait_for(ready.exists, "ranks")
    site.lab.command("scancel", job_id)
    assert site.end("unwanted", job_id) == "CANCELLED"
    assert site.lab.job(job_id)["Restarts"] == "0"
    (attempt,) = read_attempts(site.folder / "unwanted")
    assert (attempt.exit_code, attempt.verdict) == (75, "requeue")
    assert "not queued again, for SLURM ends it: COMPLETING" in site.output("unwanted")
