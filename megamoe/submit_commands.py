"""`megamoe submit`: arguments, output, exit codes. No torch.

Exit codes: 0 submitted (with --follow: and completed), 1 with --follow: the job did not complete, 2 refused.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.arguments import add_config_arguments, positive
from megamoe.errors import ConfigError, MegamoeError

if TYPE_CHECKING:
    from megamoe.config.schema import Config
    from megamoe.submit.job import JobSettings
    from megamoe.submit.script import Job

SETTINGS_VARIABLE = "MEGAMOE_CLUSTER_SETTINGS"  # the file of --cluster-settings, for a whole site
POLL_SECONDS = 2.0
_EPILOG = """examples:
  megamoe submit my_run.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 --dry-run
  megamoe submit launch_scripts/layouts/moe-1.1t.yaml --nodes 64 --cluster-settings site.yaml --cluster a100-80gb \\
      data.train='[{path: /data/text}]' run.dir=/runs/first
  megamoe submit small.yaml large.yaml --nodes 4 --gpus-per-node 8      an array of two runs"""

# Options that are settings of the same name: what they take, and their help.
_OPTIONS = {
    "nodes": ("N", positive, "nodes of the job (1)"),
    "gpus-per-node": ("N", int, "GPUs that SLURM is asked for on each node"),
    "cpus-per-rank": ("N", positive, "CPU cores of each rank"),
    "memory-per-node": ("SIZE", str, "as SLURM writes it; 0: all of it"),
    "partition": ("NAME", str, None),
    "account": ("NAME", str, None),
    "qos": ("NAME", str, None),
    "time": ("LIMIT", str, "time limit as SLURM writes it: 24:00:00, 2-12, minutes"),
    "constraint": ("LIST", str, "features that nodes must have"),
    "reservation": ("NAME", str, None),
    "exclude": ("NODES", str, "nodes to do without"),
    "dependency": ("LIST", str, "as in afterany:1234: where jobs cannot be queued again, let one follow another"),
    "signal-seconds": ("N", positive, "before the time limit, when ranks are asked to save"),
    "grace-seconds": ("N", positive, "how long the other ranks may go on when one has ended (60)"),
    "job-name": ("NAME", str, "default: the last part of run.dir"),
    "array-limit": ("N", positive, "of several configurations, how many are trained at a time"),
    "container-image": ("IMAGE", str, "an image that enroot knows, or a .sif file"),
    "python": ("PATH", str, "default: the one that submits; in a container python3"),
    "cluster": ("NAME|FILE", str, "of `megamoe plan`: refuse what does not fit it"),
}
_LISTS = {
    "container-mount": ("container_mounts", "SOURCE:TARGET", "a folder that the container sees"),
    "module": ("modules", "NAME", "a module to load"),
    "setup": ("setup", "LINE", "a shell line before all else, such as `source venv/bin/activate`"),
    "sbatch-option": ("sbatch_options", "OPTION", "one more option of sbatch, as in --sbatch-option=--switches=1"),
    "srun-option": ("srun_options", "OPTION", "one more option of srun"),
}


def add_submit_commands(commands: Any) -> None:
    """Add `submit` to the subcommands of `megamoe`."""
    parser = commands.add_parser(
        "submit",
        help="train on a SLURM cluster: check, write the script, submit it",
        description="Train on a SLURM cluster: check everything, write the script into the run's folder, submit it. "
        "The job saves before its time limit, is queued again, and goes on by itself.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_submit, parser=parser)
    add_config_arguments(parser)
    parser.add_argument("--ranks-per-node", "--ntasks-per-node", type=positive, metavar="N", help="default: the GPUs")
    for name, (metavar, kind, text) in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    for name, (key, metavar, text) in _LISTS.items():
        help_text = f"{text}; may be repeated"
        parser.add_argument(f"--{name}", action="append", dest=key, metavar=metavar, help=help_text)
    parser.add_argument(
        "--env", action="append", metavar="NAME=VALUE", help="an environment variable of the job; may be repeated"
    )
    parser.add_argument("--launcher", choices=("srun", "torchrun"), help="srun: a task for each rank (the default)")
    parser.add_argument("--container", choices=("none", "pyxis", "apptainer"), help="what makes it (none)")
    for name, text in (("requeue", "queue the job again by itself"), ("preflight", "test the nodes first")):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=f"{text} (yes)")
    parser.add_argument("--max-attempts", type=positive, metavar="N", help="how many may fail: restart.max_attempts")
    parser.add_argument(
        "--cluster-settings", metavar="FILE", default=os.environ.get(SETTINGS_VARIABLE),
        help=f"YAML with defaults for these options, names with _ for -; default: ${SETTINGS_VARIABLE}",
    )  # fmt: skip
    parser.add_argument("--no-path-checks", action="store_true", help="do not look for data: it is elsewhere here")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--follow", action="store_true", help="print the job's output until it ends")


def _submit(options: argparse.Namespace) -> int:
    from megamoe.submit import slurm
    from megamoe.submit.checks import check_queue, note_job, write_job
    from megamoe.submit.script import render

    job, configs = _checked_job(options)
    script = render(job)
    if options.dry_run:
        print(script, end="")
        if slurm.is_up():
            print(slurm.test_only(script).strip(), file=sys.stderr)
        else:
            print("no SLURM answers here: what it says of this script is not known", file=sys.stderr)
        return 0
    if job.settings.container == "pyxis" and not slurm.knows_container_images():
        raise ConfigError("container pyxis needs SLURM's plugin of that name, which srun lacks here: use apptainer")
    if job.settings.dependency is None:
        for run in job.runs:
            check_queue(run)
    write_job(job, script, configs)
    job_id = slurm.submit_script(job.script)
    note_job(job, job_id)
    _tell(job, job_id)
    return _follow(job, job_id) if options.follow else 0


def _checked_job(options: argparse.Namespace) -> tuple["Job", list["Config"]]:
    """Everything that can be known before SLURM is asked."""
    from megamoe.config.loading import load_config
    from megamoe.submit.checks import check_config, check_paths, check_run
    from megamoe.submit.job import read_job_settings, signal_seconds
    from megamoe.submit.script import Job, Run

    settings = read_job_settings(options.cluster_settings, _given(options))
    _check_sizes_are_given(settings)
    work_dir = Path.cwd()
    sources, overrides = _sources(options)
    configs = [_bounded(load_config(source, overrides), options.max_attempts) for source in sources]
    runs = tuple(Run(Path(os.path.normpath(work_dir / config.run.dir))) for config in configs)
    if len({run.dir for run in runs}) < len(runs):
        raise ConfigError(f"several runs would have the folder {runs[0].dir}: give each configuration its own run.dir")
    for source, config, run in zip(sources, configs, runs, strict=True):
        try:
            check_config(config, settings)
            if not options.no_path_checks:
                check_paths(config, work_dir)
            check_run(config, run)
        except MegamoeError as error:
            raise type(error)(f"{source}: {error}" if len(sources) > 1 else str(error)) from None
    job = Job(
        settings=settings,
        runs=runs,
        name=settings.job_name or re.sub(r"[^\w.-]", "_", runs[0].dir.name),
        signal_seconds=max(signal_seconds(settings, config) for config in configs),
        work_dir=work_dir,
        python=settings.python or (sys.executable if settings.container == "none" else "python3"),
        python_path=os.environ.get("PYTHONPATH"),
    )
    return job, configs


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    names = ["ranks-per-node", "launcher", "container", "requeue", "preflight", *_OPTIONS]
    keys = [name.replace("-", "_") for name in names] + [key for key, _, _ in _LISTS.values()]
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    variables = [text.partition("=") for text in options.env or ()]
    for name, equals, _ in variables:
        if not equals:
            raise ConfigError(f'--env is "{name}": write NAME=VALUE')
    return given | ({"environment": {name: value for name, _, value in variables}} if variables else {})


def _check_sizes_are_given(settings: "JobSettings") -> None:
    if settings.ranks_per_node is None and settings.gpus_per_node is None:
        raise ConfigError("the number of ranks is not known: give --gpus-per-node, or --ranks-per-node without GPUs")


def _sources(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Configurations, and what all of them are changed by: what holds an = and is no file."""
    is_file = {text: "=" not in text.partition(".")[2] or os.path.exists(text) for text in options.overrides}
    overrides = [text for text in options.overrides if not is_file[text]]
    return [options.source, *(text for text in options.overrides if is_file[text])], overrides


def _bounded(config: "Config", max_attempts: int | None) -> "Config":
    """With --max-attempts as given: it bounds those that leave no checkpoint, too."""
    from megamoe.config.loading import override_config

    if max_attempts is None:
        return config
    stuck = min(max_attempts, config.restart.max_attempts_without_progress)
    bounds = {"max_attempts": max_attempts, "max_attempts_without_progress": stuck}
    return override_config(config, [f"restart.{key}={value}" for key, value in bounds.items()], "--max-attempts")


def _tell(job: "Job", job_id: str) -> None:
    settings = job.settings
    size = f"{settings.nodes} nodes x {settings.num_ranks_per_node} ranks"
    print(f"job {job_id}: {f'array of {len(job.runs)} runs, each ' if job.is_array else ''}{size}")
    print(f"  script  {job.script}")
    for number, run in enumerate(job.runs):
        task = f"{job_id}_{number}" if job.is_array else job_id
        print(f"  run     {run.dir}")
        print(f"  follow  tail -F {run.folder}/job-{task}.out, or megamoe status {run.dir}")
        print(f"  stop    touch {run.dir}/stop ends it with its state saved; scancel {task}")
    sys.stdout.flush()


def _follow(job: "Job", job_id: str) -> int:
    """Print what the job's first run prints, until the job has left the queue. Ctrl-C leaves the job alone."""
    from megamoe.submit import slurm

    output = job.runs[0].folder / f"job-{f'{job_id}_0' if job.is_array else job_id}.out"
    position, told, in_queue = 0, None, True
    while in_queue:
        state = slurm.job_state(job_id)
        in_queue = state is not None
        if in_queue and state != told:
            print(f"job {job_id} is {state}", file=sys.stderr)
            told = state
        if output.exists():
            with open(output, "rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            sys.stdout.write(text.decode("utf-8", errors="replace"))
            sys.stdout.flush()
        if in_queue:
            time.sleep(POLL_SECONDS)
    state = slurm.final_state(job_id) or "no longer known to SLURM"
    print(f"job {job_id} has ended: {state}", file=sys.stderr)
    return 0 if state == "COMPLETED" else 1
