"""Settings of jobs, and the refusals of `megamoe submit`: one sentence each, before SLURM is asked for anything."""

import json
import os
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.errors import ConfigError
from megamoe.runs.restarts import restart_settings
from megamoe.submit.job import JobSettings, read_job_settings, signal_seconds, time_seconds

RANKS = ["--nodes", "2", "--ranks-per-node", "2"]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder with a dataset and a configuration, and no SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MEGAMOE_CLUSTER_SETTINGS", raising=False)
    for ending in (".bin", ".idx"):
        (tmp_path / f"text{ending}").write_bytes(b"")
    (tmp_path / "run.yaml").write_text("preset: laptop-moe\ndata: {train: [{path: text}]}\nrun: {dir: runs/first}\n")
    return tmp_path


def refusal(capsys, *arguments: str) -> str:
    assert main(["submit", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("megamoe: error: ")
    return captured.err.removeprefix("megamoe: error: ").strip()


def test_a_dry_run_prints_the_script_and_leaves_nothing(work, capsys):
    before = sorted(work.rglob("*"))
    assert main(["submit", "run.yaml", *RANKS, "--time", "1:00:00", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=first\n")
    for line in ("--nodes=2", "--ntasks-per-node=2", "--time=1:00:00", "--signal=B:USR1@360", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "gpus" not in script
    assert sorted(work.rglob("*")) == before


def test_without_slurm_nothing_is_submitted(work, capsys):
    assert main(["submit", "run.yaml", *RANKS]) == 2
    assert capsys.readouterr().err == (
        "megamoe: error: sbatch is not installed here: submit where SLURM is, or look at the script with --dry-run\n"
    )
    assert (work / "runs/first/slurm/job.sbatch").read_text().startswith("#!/bin/bash\n")
    assert load_config("runs/first/slurm/config.yaml") == load_config("run.yaml")


def test_overrides_reach_the_configuration_that_is_trained(work):
    main(["submit", "run.yaml", "run.num_steps=70", *RANKS, "optimizer.lr=0.5", "--max-attempts", "9"])
    config = load_config("runs/first/slurm/config.yaml")
    assert (config.run.num_steps, config.optimizer.lr, config.restart.max_attempts) == (70, 0.5, 9)


@pytest.mark.parametrize(
    ("given", "bounds"), [(["2"], (2, 2)), (["9"], (9, 3)), (["9", "restart.max_attempts=4"], (9, 3))], ids=str
)
def test_the_number_of_attempts_bounds_those_without_progress(work, given, bounds):
    main(["submit", "run.yaml", *RANKS, "--max-attempts", *given])
    restart = load_config("runs/first/slurm/config.yaml").restart
    assert (restart.max_attempts, restart.max_attempts_without_progress) == bounds


def test_bounds_are_known_before_training_begins_and_a_run_with_a_checkpoint_keeps_its_record(work):
    for number in (2, 3):
        main(["submit", "run.yaml", *RANKS, "--max-attempts", str(number)])
        assert restart_settings("runs/first").max_attempts == number
    checkpoint = work / "runs/first/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    main(["submit", "run.yaml", *RANKS, "--max-attempts", "5"])
    assert restart_settings("runs/first").max_attempts == 3
    assert load_config("runs/first/slurm/config.yaml").restart.max_attempts == 5


def test_a_run_that_was_asked_to_stop_is_not_submitted(work, capsys):
    stop = work / "runs/first/stop"
    stop.parent.mkdir(parents=True)
    stop.touch()
    message = refusal(capsys, "run.yaml", *RANKS)
    assert message == f"{stop} asks this run not to train: remove that file to submit it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the number of ranks is not known: give --gpus-per-node, or --ranks-per-node without GPUs"),
        (["--gpus-per-node", "4", "--ranks-per-node", "5"], "ranks_per_node 5 is more than gpus_per_node 4: use 1 to"),
        (
            [*RANKS, "parallel.tensor_parallel_size=3", "--nodes", "1"],
            "tensor_parallel_size 3 does not divide num_attention_heads 4: use 1, 2, 4",
        ),
        (
            ["--ranks-per-node", "3", "parallel.tensor_parallel_size=2"],
            "on 1 x 3 ranks: 3 ranks are not a multiple of tensor_parallel_size 2 x pipeline_parallel_size 1 = 2:",
        ),
        ([*RANKS, "data.train=[]"], "data.train is empty: name an indexed dataset"),
        (
            [*RANKS, "data.train=[{path: other}]"],
            "data.train names other, but {work}/other.bin does not exist: give the path of a dataset without its",
        ),
        ([*RANKS, "checkpoint.load_from=nothing"], "checkpoint.load_from {work}/nothing holds no checkpoint"),
        (
            [*RANKS, "run.dir=text.bin/run"],
            "run.dir {work}/text.bin/run cannot be made, for {work}/text.bin is no folder: choose another",
        ),
        ([*RANKS, "run.device=cuda"], "run.device cuda needs GPUs, and gpus_per_node is not set: give --gpus-per-node"),
        ([*RANKS, "--time", "soon"], 'time is "soon": write minutes, or hours as in 24:00:00, or days as in'),
        ([*RANKS, "--time", "2"], "time 2 is too short to train and save in: use more than 120 s, or signal_seconds"),
        (
            [*RANKS, "--time", "5", "--signal-seconds", "300"],
            "signal_seconds 300 leaves nothing of time 5, for SLURM may signal 60 s early: use a time of more than 360",
        ),
        ([*RANKS, "--container", "pyxis"], "container pyxis needs container_image: give an image that enroot knows"),
        (
            [*RANKS, "--container-image", "x"],
            "container_image and container_mounts mean nothing to container none: use pyxis or apptainer",
        ),
        (
            [*RANKS, "--container", "apptainer", "--container-image", "x", "--container-mount", "data"],
            'container_mounts holds "data": write SOURCE:TARGET, as in /data:/data',
        ),
        ([*RANKS, "--env", "A"], '--env is "A": write NAME=VALUE'),
        ([*RANKS, "--env", "A B=c"], 'environment names "A B": use letters, digits and _, as in NCCL_DEBUG'),
        ([*RANKS, "--partition", "a\nb"], 'partition is "a\\nb": write one line of text'),
        ([*RANKS, "--sbatch-option", "switches"], 'sbatch_options holds "switches": write an option of sbatch'),
        ([*RANKS, "--cluster-settings", "none.yaml"], "cannot read none.yaml: No such file or directory"),
        ([*RANKS, "run.yaml"], "several runs would have the folder {work}/runs/first: give each configuration its own"),
        ([*RANKS, "other.yaml"], 'no file "other.yaml", nor a preset of that name'),
    ],
)
def test_refusals(work, capsys, arguments, message):
    assert refusal(capsys, "run.yaml", *arguments).startswith(message.replace("{work}", str(work)))
    assert not (work / "runs").exists()


def test_one_of_several_runs_is_named(work, capsys):
    text = (work / "run.yaml").read_text()
    (work / "b.yaml").write_text(text.replace("runs/first", "runs/b, micro_batch_size: 8"))
    assert refusal(capsys, "run.yaml", "b.yaml", *RANKS).startswith("b.yaml: on 2 x 2 ranks: global_batch_size ")
    (work / "b.yaml").write_text(text.replace("runs/first", "runs/b").replace("path: text", "path: tex"))
    assert refusal(capsys, "run.yaml", "b.yaml", *RANKS).startswith("b.yaml: data.train names tex, but ")


def test_hierarchical_exchange_wants_the_jobs_own_nodes(work, capsys):
    settings = ["parallel.expert_parallel_size=4", "parallel.all_to_all=hierarchical", "parallel.ranks_per_node=4"]
    message = refusal(capsys, "run.yaml", *RANKS, *settings)
    assert message == "parallel.ranks_per_node 4 is not the job's 2: use the same number"


@pytest.mark.parametrize(("nodes", "fits"), [(64, True), (8, False)])
def test_what_does_not_fit_the_cluster_is_refused(work, capsys, nodes, fits):
    layout = Path(__file__).parents[2] / "launch_scripts" / "layouts" / "moe-1.1t.yaml"
    experts = [] if fits else ["parallel.expert_parallel_size=64"]
    arguments = [str(layout), "--nodes", str(nodes), "--gpus-per-node", "8", "--cluster", "a100-80gb", "--dry-run",
                 "data.train=[{path: text}]", *experts]  # fmt: skip
    if fits:
        assert main(["submit", *arguments]) == 0
        return
    message = refusal(capsys, *arguments)
    assert message.startswith("the plan does not fit 64 GPUs of a100-80gb: ")
    assert message.endswith("GiB are needed; use more GPUs")


def test_settings_of_a_site_come_first(work, capsys, monkeypatch):
    (work / "site.yaml").write_text(
        "partition: gpu\naccount: lab\ntime: 24:00:00\ngpus_per_node: 8\nmodules: [cuda/12]\n"
        "environment: {NCCL_DEBUG: WARN, A: '1'}\npreflight: false\n"
    )
    monkeypatch.setenv("MEGAMOE_CLUSTER_SETTINGS", "site.yaml")
    arguments = ["--partition", "big", "--module", "nccl/2", "--env", "NCCL_DEBUG=INFO", "--preflight"]
    assert main(["submit", "run.yaml", *arguments, "--dry-run", "run.global_batch_size=32"]) == 0
    script = capsys.readouterr().out
    for line in ("--partition=big", "--account=lab", "--time=24:00:00", "--gpus-per-node=8", "--ntasks-per-node=8"):
        assert f"#SBATCH {line}\n" in script
    assert "module load cuda/12\nmodule load nccl/2\n" in script
    assert "export NCCL_DEBUG=INFO\nexport A=1\n" in script and "preflight()" in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu\n", 'unknown key "partitoin" in site.yaml: did you mean "partition"?'),
        ("nodes: 0\n", "nodes is 0 in site.yaml: it must be a whole number of at least 1"),
        ("environment: [1]\n", "environment is [1] in site.yaml: it must be texts by name"),
        ("modules: cuda\n", 'modules is "cuda" in site.yaml: it must be a list, each text'),
        ("requeue: 3\n", "requeue is 3 in site.yaml: it must be true or false"),
        ("launcher: mpi\n", 'launcher is "mpi" in site.yaml: it must be one of srun, torchrun'),
    ],
)
def test_wrong_settings_of_a_site(work, text, message):
    (work / "site.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_job_settings("site.yaml", {})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:02:03", 3723), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784), (90, 5400)],
)
def test_time_limits_are_read_as_slurm_reads_them(text, seconds):
    assert time_seconds(text) == seconds


def test_the_signal_leaves_time_to_save():
    usual, quick = load_config("laptop-moe"), load_config("laptop-moe", ["checkpoint.save_timeout_seconds=90.5"])
    assert signal_seconds(JobSettings(), usual) == 600
    assert signal_seconds(JobSettings(time="24:00:00"), quick) == 91
    assert signal_seconds(JobSettings(time=30), usual) == 180
    assert signal_seconds(JobSettings(time=5), usual) == 60
    assert signal_seconds(JobSettings(time=5, signal_seconds=7), usual) == 7


def test_a_rank_under_a_launcher_leaves_its_exit_code(work, capsys, monkeypatch):
    """torchrun would replace it; the first rank to say counts."""
    path = work / "exit-code"
    monkeypatch.setenv("MEGAMOE_EXIT_CODE_FILE", str(path))
    assert main(["train", "run.yaml", "data.train=[]"]) == 2
    assert path.read_text() == "2\n"
    path.write_text("75\n")
    assert main(["train", "run.yaml", "data.train=[]"]) == 2
    assert path.read_text() == "75\n"
    path.unlink()
    assert main(["show", "no-such-preset"]) == 2
    assert not path.exists()


def fake_slurm(folder: Path, **programs: str) -> dict[str, str]:
    """PATH with programs of these bodies."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), "/usr/bin", "/bin"])


def test_what_is_printed_after_submission(work, capsys, monkeypatch):
    monkeypatch.setenv("PATH", fake_slurm(work, sbatch="echo '12;cluster'", squeue="echo PENDING"))
    assert main(["submit", "run.yaml", *RANKS]) == 0
    run = work / "runs/first"
    assert capsys.readouterr().out.splitlines() == [
        "job 12: 2 nodes x 2 ranks",
        f"  script  {run}/slurm/job.sbatch",
        f"  run     {run}",
        f"  follow  tail -F {run}/slurm/job-12.out, or megamoe status {run}",
        f"  stop    touch {run}/stop ends it with its state saved; scancel 12",
    ]
    assert not (run / "plan.json").exists()
    message = refusal(capsys, "run.yaml", *RANKS)
    assert message == (
        f"job 12 of {run} is PENDING: scancel it first, or let this one follow it by --dependency afterany:12"
    )
    assert main(["submit", "run.yaml", *RANKS, "--dependency", "afterany:12"]) == 0
    assert (run / "slurm/job-ids").read_text() == "12\n12\n"


def test_the_plan_of_a_named_cluster_is_left_in_the_runs_folder(work, capsys, monkeypatch):
    monkeypatch.setenv("PATH", fake_slurm(work, sbatch="echo 12"))
    sizes = ["--nodes", "1", "--gpus-per-node", "2"]
    assert main(["submit", "run.yaml", *sizes, "--cluster", "a100-80gb"]) == 0
    capsys.readouterr()
    assert main(["plan", "run.yaml", "--cluster", "a100-80gb", "--gpus", "2", "--json"]) == 0
    planned, written = json.loads(capsys.readouterr().out), json.loads((work / "runs/first/plan.json").read_text())
    assert written.pop("remedies", []) == [] and planned.pop("remedies", []) is not None
    assert written == planned


def test_slurms_own_words_are_passed_on(work, capsys, monkeypatch):
    body = "echo 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1"
    monkeypatch.setenv("PATH", fake_slurm(work, sbatch=body))
    assert refusal(capsys, "run.yaml", *RANKS) == "sbatch refused: invalid partition specified: gpu"
    assert not (work / "runs/first/slurm/job-ids").exists()


def test_pyxis_has_to_be_there(work, capsys, monkeypatch):
    monkeypatch.setenv("PATH", fake_slurm(work, sbatch="echo 12", srun="echo usage"))
    message = refusal(capsys, "run.yaml", *RANKS, "--container", "pyxis", "--container-image", "x")
    assert message == "container pyxis needs SLURM's plugin of that name, which srun lacks here: use apptainer"


def test_following_a_job_until_its_end(work, capsys, monkeypatch):
    """The output so far, what is added, and the state in which it ended."""
    squeue = f'n=$(cat "{work}/n" 2>/dev/null || echo 0); echo $((n + 1)) > "{work}/n"\n' + (
        f'[ "$n" -ge 2 ] && exit 0; echo "line $n" >> "{work}/runs/first/slurm/job-12.out"; echo RUNNING'
    )
    scontrol = "echo JobId=12 JobState=FAILED ExitCode=1:0"
    monkeypatch.setenv("PATH", fake_slurm(work, sbatch="echo 12", squeue=squeue, scontrol=scontrol))
    monkeypatch.setattr("megamoe.submit_commands.POLL_SECONDS", 0.01)
    assert main(["submit", "run.yaml", *RANKS, "--follow"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-2:] == ["line 0", "line 1"]
    assert captured.err == "job 12 is RUNNING\njob 12 has ended: FAILED\n"


def test_settings_are_json_of_themselves():
    """What a site's file gives is merged as JSON: nothing may get lost on the way."""
    settings = JobSettings(time=90, environment={"A": "b"}, modules=("x",), array_limit=2)
    assert JobSettings.model_validate_json(json.dumps(settings.model_dump(mode="json")), strict=True) == settings
