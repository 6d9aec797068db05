"""The script of a job: `job.sbatch` beside this file with the directives, quotes and commands of one job in it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.errors import ConfigError
from megamoe.submit.job import JobSettings

TEMPLATE = Path(__file__).parent / "job.sbatch"
SCRIPT_FOLDER = "slurm"  # in the run's folder
FIRST_TORCHRUN_PORT, NUM_TORCHRUN_PORTS = 20_000, 10_000
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,@%+-]*")

_ON_TERM = """\
# SLURM ends this job, and has told its ranks. At the time limit, when saving took too long, there may be no moment
# left for what comes below.
cut_off() {
    signalled=yes woken=yes
    [[ $(squeue --noheader --jobs="$job" --format=%r) == TimeLimit ]] || return
    scontrol requeue "$job" && requeued=yes && say "cut off at its time limit and queued again"
}
trap cut_off TERM"""


@dataclass(frozen=True)
class Run:
    """One run of a job: its folder, absolute, and the resolved configuration that is trained."""

    dir: Path

    @property
    def folder(self) -> Path:
        return self.dir / SCRIPT_FOLDER

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"


@dataclass(frozen=True)
class Job:
    """What a script is rendered of. Several runs make an array.

    work_dir: where relative paths of the configuration begin. python_path: PYTHONPATH of the submitting process.
    """

    settings: JobSettings
    runs: tuple[Run, ...]
    name: str
    signal_seconds: int
    work_dir: Path
    python: str
    python_path: str | None = None

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1

    @property
    def script(self) -> Path:
        return self.runs[0].folder / ("array.sbatch" if self.is_array else "job.sbatch")


def render(job: Job) -> str:
    """The whole script. Raises ConfigError for a run folder whose name SLURM cannot hold."""
    blocks = {
        "directives": "\n".join(f"#SBATCH {option}" for option in directives(job)),
        "run": _run_lines(job),
        "work_dir": shlex.quote(str(job.work_dir)),
        "output": 'exec >>"$run_dir/slurm/job-$job.out" 2>&1' if job.is_array else "",
        "setup": _setup(job),
        "on_term": _ON_TERM if job.settings.requeue else "trap 'signalled=yes woken=yes' TERM",
        "once": _joined(_once(job)),
        "commands": _commands(job),
        "preflight": "step preflight\ncode=$?" if job.settings.preflight else "",
        "exit_code": _torchrun_exit_code(job),
        "requeue": _requeue(job),
    }
    text = _PLACE.sub(lambda found: blocks[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def directives(job: Job) -> list[str]:
    """Options of sbatch, one a line, quoted as sbatch reads them in a script."""
    settings = job.settings
    name = "array-%A_%a.out" if job.is_array else "job-%j.out"
    options = {
        "job-name": job.name,
        "output": f"{_file_pattern(job.runs[0].folder)}/{name}",
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": settings.num_ranks_per_node,
        "gpus-per-node": settings.gpus_per_node or None,
        "cpus-per-task": settings.cpus_per_rank,
        "mem": settings.memory_per_node,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "reservation": settings.reservation,
        "exclude": settings.exclude,
        "dependency": settings.dependency,
        "array": _array(job),
        "signal": f"B:USR1@{job.signal_seconds}",
    }
    lines = [f"--{option}={_escaped(str(value))}" for option, value in options.items() if value is not None]
    lines.append("--requeue" if settings.requeue else "--no-requeue")
    return [*lines, *(_escaped(option) for option in settings.sbatch_options)]


def _array(job: Job) -> str | None:
    if not job.is_array:
        return None
    limit = job.settings.array_limit
    return f"0-{len(job.runs) - 1}" + (f"%{limit}" if limit else "")


def _file_pattern(folder: Path) -> str:
    """A folder's name as SLURM reads file names: % begins what it fills in."""
    name = str(folder)
    if "\\" in name or re.search(r"[\x00-\x1f\x7f]", name):
        raise ConfigError(f"run.dir {folder.parent} holds a backslash or a control character: choose another name")
    return name.replace("%", "%%")


def _escaped(text: str) -> str:
    """As sbatch reads it in a script: between double quotes only a backslash and a quote need a backslash."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _run_lines(job: Job) -> str:
    if not job.is_array:
        return _variables(job.runs[0])
    cases = [f"{number})\n    {_variables(run, '    ')}\n    ;;" for number, run in enumerate(job.runs)]
    return "case $SLURM_ARRAY_TASK_ID in\n" + "\n".join(cases) + "\n*) exit 2 ;;\nesac"


def _variables(run: Run, indent: str = "") -> str:
    return f"run_dir={shlex.quote(str(run.dir))}\n{indent}config={shlex.quote(str(run.config))}"


def _setup(job: Job) -> str:
    """What must go well before anything of megamoe is called."""
    settings = job.settings
    lines = [f"module load {shlex.quote(module)}" for module in settings.modules]
    lines += settings.setup
    if job.python_path and settings.container == "none":
        lines.append(f"export PYTHONPATH={shlex.quote(job.python_path)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.environment.items()]
    return "\n".join(["set -e", *lines, "set +e"]) if lines else ""


def _inside(job: Job) -> list[str]:
    """What goes before a command that is to run in the container, where srun does not make it."""
    settings = job.settings
    if settings.container != "apptainer":
        return []
    mounts = [f"--bind={shlex.quote(mount)}" for mount in settings.container_mounts]
    gpus = ["--nv"] if settings.gpus_per_node else []
    image = shlex.quote(settings.container_image or "")
    return ["apptainer", "exec", *gpus, *mounts, f"--pwd={shlex.quote(str(job.work_dir))}", image]


def _pyxis(job: Job) -> list[str]:
    """Options that make srun start tasks in the container."""
    settings = job.settings
    if settings.container != "pyxis":
        return []
    options = {
        "image": settings.container_image or "",
        "mounts": ",".join(settings.container_mounts),
        "workdir": str(job.work_dir),
    }
    return [f"--container-{name}={shlex.quote(value)}" for name, value in options.items() if value]


def _megamoe(job: Job) -> list[str]:
    return [*_inside(job), shlex.quote(job.python), "-m", "megamoe"]


def _once(job: Job) -> list[str]:
    one_task = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--overlap", *_pyxis(job)]
    return [*(one_task if job.settings.container == "pyxis" else []), *_megamoe(job)]


def _commands(job: Job) -> str:
    """The functions `preflight` and `ranks`, which `step` runs as processes of their own.

    --wait: when a rank has ended, the others are given time to say why. To kill them at once (--kill-on-bad-exit)
    would also replace the exit code of ranks that all leave, one a moment before the others.
    """
    settings = job.settings
    cpus = settings.cpus_per_rank  # srun does not inherit it from sbatch
    options = [*(shlex.quote(option) for option in settings.srun_options), *_pyxis(job)]
    srun = ["exec", "srun", "--label", f"--wait={settings.grace_seconds}"]
    per_rank = _joined([*srun, *([f"--cpus-per-task={cpus}"] if cpus else []), *options, *_megamoe(job)])
    functions = []
    if settings.preflight:
        functions.append(f'# Every node is tested by its ranks\npreflight() {{\n    {per_rank} preflight "$config"\n}}')
    if settings.launcher == "srun":
        functions.append(f'# One task for each rank\nranks() {{\n    {per_rank} train "$config"\n}}')
    else:
        cpus_per_node = [f"--cpus-per-task={cpus * settings.num_ranks_per_node}"] if cpus else []
        one_task = [f"--ntasks={settings.nodes}", "--ntasks-per-node=1", *cpus_per_node]
        functions.append(_torchrun(job, [*srun, *one_task, *options]))
    return "\n\n".join(functions)


def _torchrun(job: Job, srun: Sequence[str]) -> str:
    """Ranks follow the order of nodes only where torchrun is told each node's place."""
    command = _joined(
        [
            "exec", *_inside(job), shlex.quote(job.python), "-m", "torch.distributed.run", '--nnodes="$SLURM_NNODES"',
            '--node-rank="$SLURM_NODEID"', f"--nproc-per-node={job.settings.num_ranks_per_node}",
            '--master-addr="$MASTER_ADDR"', '--master-port="$MASTER_PORT"', "-m", "megamoe", 'train "$1"',
        ]
    )  # fmt: skip
    node = shlex.quote(f"trap '' USR1 TERM\n{command}")
    return f"""\
# torchrun has an exit code of its own for every failure: ranks leave theirs in this file
export MEGAMOE_EXIT_CODE_FILE="$run_dir/slurm/exit-code-$job"
rm -f "$MEGAMOE_EXIT_CODE_FILE"

# One torchrun for each node, which would die of a signal that is meant for its ranks. They meet at the first node.
ranks() {{
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR="${{MASTER_ADDR:-${{nodes%%$'\\n'*}}}}"
    export MASTER_PORT="${{MASTER_PORT:-$(({FIRST_TORCHRUN_PORT} + SLURM_JOB_ID % {NUM_TORCHRUN_PORTS}))}}"
    {_joined([*srun, "bash", "-c"])} {node} torchrun "$config"
}}"""


def _torchrun_exit_code(job: Job) -> str:
    if job.settings.launcher != "torchrun":
        return ""
    return '\n    [[ $code == 0 || ! -s $MEGAMOE_EXIT_CODE_FILE ]] || code=$(<"$MEGAMOE_EXIT_CODE_FILE")'


def _joined(words: Sequence[str]) -> str:
    """A command on lines of up to about 110 columns."""
    lines, width = [""], 0
    for word in words:
        if width and width + len(word) > 105:
            lines.append("")
            width = 0
        lines[-1] += word if not lines[-1] else f" {word}"
        width += len(word) + 1
    return " \\\n        ".join(lines)


def _requeue(job: Job) -> str:
    if not job.settings.requeue:
        return 'say "the same job goes on from there when it is submitted again"\nexit "$code"'
    excluded = shlex.quote(job.settings.exclude or "")
    return f"""
# A job that was cancelled, and is only ending, must not come back.
state=$(squeue --noheader --jobs="$job" --format=%T)
if [[ -z $requeued && $state != RUNNING ]]; then
    say "not queued again, for SLURM ends it: ${{state:-no state}}"
    exit "$code"
fi
trap '' USR1 TERM # SLURM ends this shell as soon as the job is queued
if [[ -z $requeued ]] && ! scontrol requeue "$job"; then
    say "SLURM does not queue it again: submitted once more, it goes on from there"
    exit "$code"
fi
# Nodes to do without can only be named while a job is not running.
excluded={excluded}
if [[ $verdict == *exclude=* ]]; then
    excluded=${{excluded:+$excluded,}}${{verdict##*exclude=}}
    scontrol update JobId="$job" ExcNodeList="$excluded" || say "not excluded: $excluded"
fi
exit "$code\""""
