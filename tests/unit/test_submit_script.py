"""The script of a job: bash and sbatch read what was meant, whatever names and texts it is made of.

The judges are bash, and a transcription of how sbatch reads its directives; tests/slurm asks sbatch itself.
"""

import itertools
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import ConfigError
from megamoe.submit.job import JobSettings
from megamoe.submit.script import Job, Run, directives, render

# What a file's name may hold on a cluster where people try.
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/\\"), min_size=1)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)))


def job(*, runs: int = 1, run_dir: str = "/runs/first", work_dir: str = "/home/me", **options) -> Job:
    folders = [Path(run_dir)] if runs == 1 else [Path(f"{run_dir}{number}") for number in range(runs)]
    python_path = options.pop("python_path", None)
    return Job(
        settings=JobSettings(**({"nodes": 2, "gpus_per_node": 4} | options)),
        runs=tuple(Run(folder) for folder in folders),
        name="first",
        signal_seconds=120,
        work_dir=Path(work_dir),
        python="/opt/my python/bin/python",
        python_path=python_path,
    )


def bash(script: str, *, check: bool = True) -> str:
    done = subprocess.run(["bash"], input=script.encode(), capture_output=True, timeout=30, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.decode()  # as it is: text mode would make one line end of them all


def assert_is_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def read_as_sbatch(line: str) -> list[str]:
    """Arguments of one line after #SBATCH, as sbatch's own reader cuts it: quotes, backslashes, comments."""
    arguments, current, quote, escaped, started = [], "", "", False, False
    for character in line:
        if not quote and character.isascii() and character.isspace():  # also after a backslash
            arguments += [current] if started else []
            current, started, escaped = "", False, False
        elif escaped:
            current, escaped, started = current + character, False, True
        elif character == "\\":
            escaped = True
        elif quote:
            quote, current = ("", current) if character == quote else (quote, current + character)
        elif character in "\"'":
            quote, started = character, True
        elif character == "#":
            break
        else:
            current, started = current + character, True
    return arguments + ([current] if started else [])


def head_of(script: str) -> str:
    """The script as far as it only sets variables."""
    return script.partition("# megamoe in one process")[0]


CONTAINERS = (
    {},
    {"container": "pyxis", "container_image": "/images/a b.sqsh", "container_mounts": ("/data:/data", "/r un:/r un")},
    {"container": "apptainer", "container_image": "/images/it's.sif", "container_mounts": ("/data:/data",)},
)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("container", CONTAINERS, ids=["host", "pyxis", "apptainer"])
@pytest.mark.parametrize("others", itertools.product((True, False), (True, False), (1, 3)), ids=str)
def test_every_kind_of_script_is_bash(launcher, container, others):
    requeue, preflight, runs = others
    made = job(
        runs=runs, launcher=launcher, **container, requeue=requeue, preflight=preflight, cpus_per_rank=6,
        exclude="node[3-5],it's", modules=("cuda/12 4",), setup=("source 'my venv/bin/activate'",),
        environment={"NCCL_DEBUG": "INFO"}, srun_options=("--mpi=none",), run_dir="/runs/it's 100% a run",
    )  # fmt: skip
    script = render(made)
    assert_is_bash(script)
    assert "{{" not in script and "}}\n" not in script
    assert ("scontrol requeue" in script) == requeue
    assert ("preflight" in script) == preflight
    assert ("torch.distributed.run" in script) == (launcher == "torchrun")
    assert max(len(line) for line in script.splitlines()) <= 180


@settings(max_examples=60, deadline=None)
@given(name=NAMES.filter(lambda name: name not in (".", "..")), value=TEXTS, module=NAMES)
def test_names_and_texts_reach_bash_as_they_are(name, value, module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    made = job(run_dir=f"/runs/{name}", work_dir=str(folder), environment={"VALUE": value}, modules=(module,),
               preflight=False)  # fmt: skip
    script = render(made)
    head = head_of(script).replace("#!/bin/bash", 'module() { printf "%s\\0" "$2"; }')
    shown = bash(head + '\nprintf "%s\\0" "$run_dir" "$config" "$PWD" "$VALUE"')
    assert shown.split("\0")[:-1] == [
        module, f"/runs/{name}", f"/runs/{name}/slurm/config.yaml", str(folder), value,
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(name=NAMES.filter(lambda name: name not in (".", "..")), text=NAMES)
def test_directives_reach_sbatch_as_they_are(name, text):
    made = job(run_dir=f"/runs/{name}", exclude=text, constraint=text, sbatch_options=(f"--comment={text}",))
    lines = directives(made)
    read = [read_as_sbatch(line) for line in lines]
    assert all(len(arguments) == 1 for arguments in read), read
    options = dict(arguments[0].split("=", 1) for arguments in read if "=" in arguments[0])
    assert options["--output"].replace("%%", "%") == f"/runs/{name}/slurm/job-%j.out"
    assert options["--exclude"] == options["--constraint"] == options["--comment"] == text


def test_a_backslash_in_a_run_folder_is_refused():
    with pytest.raises(ConfigError, match=r"^run.dir /runs/a\\b holds a backslash or a control character: choose"):
        render(job(run_dir="/runs/a\\b"))


def test_what_sbatch_is_asked_for():
    made = job(
        partition="gpu", account="me", qos="high", time="24:00:00", constraint="a100", reservation="week",
        exclude="n[1-2]", dependency="afterany:7", memory_per_node="0", cpus_per_rank=6, ranks_per_node=2,
        sbatch_options=("--switches=1",),
    )  # fmt: skip
    assert directives(made) == [
        "--job-name=first", "--output=/runs/first/slurm/job-%j.out", "--open-mode=append", "--nodes=2",
        "--ntasks-per-node=2", "--gpus-per-node=4", "--cpus-per-task=6", "--mem=0", "--time=24:00:00",
        "--partition=gpu", "--account=me", "--qos=high", "--constraint=a100", "--reservation=week",
        '--exclude="n[1-2]"', "--dependency=afterany:7", "--signal=B:USR1@120", "--requeue", "--switches=1",
    ]  # fmt: skip


def test_an_array_takes_each_part_to_its_run():
    script = render(job(runs=3, array_limit=2, work_dir="/"))
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --output=/runs/first0/slurm/array-%A_%a.out\n" in script
    head = head_of(script).replace("exec >>", "exec 3>&1 # ")
    for part in range(3):
        variables = f"SLURM_JOB_ID=9 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID={part}\n"
        shown = bash(variables + head + '\necho "$job $run_dir $config"')
        assert shown == f"7_{part} /runs/first{part} /runs/first{part}/slurm/config.yaml\n"
    assert bash("SLURM_JOB_ID=9\n" + head_of(render(job(work_dir="/"))) + "\necho $job") == "9\n"


def test_setup_that_fails_ends_the_job():
    script = render(job(setup=("false", "echo never"), work_dir="/"))
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1 and done.stdout == ""


def calls_of(script: str, function: str) -> list[str]:
    """The words that the function of a script gives to srun."""
    body = script[script.index("# megamoe in one process") : script.index("MEGAMOE_ATTEMPT=$(")]
    stubs = 'srun() { printf "%s\\0" "$@"; }\nexec() { "$@"; }\nscontrol() { printf "n1\\nn2\\n"; }\n'
    variables = "config='/c o' run_dir=/runs/first job=7 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n[1-2]\n"
    return bash(f"{variables}{stubs}{body}\n{function}").split("\0")[:-1]


def test_ranks_are_tasks_of_srun():
    made = job(cpus_per_rank=6, srun_options=("--mpi=none",))
    common = ["--label", "--wait=60", "--cpus-per-task=6", "--mpi=none", "/opt/my python/bin/python", "-m", "megamoe"]
    script = render(made)
    assert calls_of(script, "ranks") == [*common, "train", "/c o"]
    assert calls_of(script, "preflight") == [*common, "preflight", "/c o"]


def test_torchrun_is_one_task_of_each_node():
    words = calls_of(render(job(launcher="torchrun", cpus_per_rank=6)), "ranks")
    assert words[:6] == ["--label", "--wait=60", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=24", "bash"]
    assert words[6] == "-c" and words[8:] == ["torchrun", "/c o"]
    trap, _, command = words[7].partition("\n")
    assert trap == "trap '' USR1 TERM"
    assert shlex.split(command.replace("\\\n", " ")) == [
        "exec", "/opt/my python/bin/python", "-m", "torch.distributed.run", "--nnodes=$SLURM_NNODES",
        "--node-rank=$SLURM_NODEID", "--nproc-per-node=4", "--master-addr=$MASTER_ADDR",
        "--master-port=$MASTER_PORT", "-m", "megamoe", "train", "$1",
    ]  # fmt: skip


def test_containers():
    pyxis = job(**CONTAINERS[1], preflight=False)
    options = ["--container-image=/images/a b.sqsh", "--container-mounts=/data:/data,/r un:/r un",
               "--container-workdir=/home/me"]  # fmt: skip
    assert calls_of(render(pyxis), "ranks")[:5] == ["--label", "--wait=60", *options]
    assert calls_of(render(pyxis), "once before-attempt /r")[:7] == [
        "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--overlap", *options,
    ]  # fmt: skip
    apptainer = job(**CONTAINERS[2], preflight=False)
    inside = ["apptainer", "exec", "--nv", "--bind=/data:/data", "--pwd=/home/me", "/images/it's.sif"]
    assert calls_of(render(apptainer), "ranks")[2:8] == inside
    assert calls_of(render(job(**CONTAINERS[2], gpus_per_node=0)), "ranks")[2:5] == [
        "apptainer", "exec", "--bind=/data:/data",
    ]  # fmt: skip
