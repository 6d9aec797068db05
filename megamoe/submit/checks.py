"""What is looked at before a job is submitted, lest it wait in a queue to fail: each finding is one sentence."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.checkpoint.files import replace_file
from megamoe.config.loading import dump_yaml
from megamoe.config.schema import Config, Corpus
from megamoe.config.validation import validate_for_training
from megamoe.errors import ConfigError, DataError
from megamoe.runs.run_folder import PLAN_FILE, checkpoint_at, resumable_checkpoints, resumable_manifest
from megamoe.runs.stop_file import STOP_FILE
from megamoe.submit import slurm
from megamoe.submit.job import JobSettings
from megamoe.submit.script import Job, Run

if TYPE_CHECKING:
    from megamoe.plan.plan import Plan

CONFIG_FILE = "config.yaml"  # of the run's folder
JOB_IDS_FILE = "job-ids"  # in the folder of scripts: one id a line, the newest last
INDEXED_ENDINGS = (".bin", ".idx")


def check_config(config: Config, settings: JobSettings) -> None:
    """Whether the configuration can be trained by the ranks of the job, and fits where a cluster is named.

    Raises ConfigError.
    """
    validate_for_training(config)
    try:
        validate_for_training(config, settings.world_size)
    except ConfigError as error:
        ranks = f"{settings.nodes} x {settings.num_ranks_per_node} ranks"
        raise ConfigError(f"on {ranks}: {error}") from None
    if config.run.device == "cuda" and not settings.gpus_per_node:
        raise ConfigError("run.device cuda needs GPUs, and gpus_per_node is not set: give --gpus-per-node")
    own = config.parallel.ranks_per_node
    if own is not None and own != settings.num_ranks_per_node and config.parallel.all_to_all == "hierarchical":
        raise ConfigError(
            f"parallel.ranks_per_node {own} is not the job's {settings.num_ranks_per_node}: use the same number"
        )
    if settings.cluster is not None:
        _check_fits(_plan_of(config, settings, settings.cluster), settings)


def _plan_of(config: Config, settings: JobSettings, cluster: str) -> "Plan":
    from megamoe.plan.cluster import load_cluster
    from megamoe.plan.plan import make_plan

    return make_plan(config, load_cluster(cluster), settings.world_size)


def _check_fits(plan: "Plan", settings: JobSettings) -> None:
    from megamoe.plan.remedies import remedies

    if plan.fits:
        return
    found = remedies(plan)
    advice = f"with {shlex.join(found[0].overrides)} it fits" if found else "use more GPUs"
    missing, memory = -plan.free_bytes / 2**30, plan.cluster.memory_bytes / 2**30
    raise ConfigError(
        f"the plan does not fit {settings.world_size} GPUs of {plan.cluster.name}: {missing:.1f} GiB more than their "
        f"{memory:.1f} GiB are needed; {advice}"
    )


def check_paths(config: Config, work_dir: Path) -> None:
    """Whether the datasets, the tokenizer and the checkpoint to start from are there.

    Raises DataError or CheckpointError.
    """
    for kind, corpora in (("train", config.data.train), ("valid", config.data.valid), ("test", config.data.test)):
        for corpus in corpora:
            _check_corpus(f"data.{kind}", corpus, work_dir)
    tokenizer = config.data.tokenizer.path
    samples = config.monitor.sample_prompt is not None and config.monitor.num_sample_tokens > 0
    if samples and tokenizer is not None and not (work_dir / tokenizer).exists():
        raise DataError(f"data.tokenizer.path {tokenizer} does not exist: give the tokenizer of the data")
    if config.checkpoint.load_from is not None:
        checkpoint_at(work_dir / config.checkpoint.load_from)


def _check_corpus(key: str, corpus: Corpus, work_dir: Path) -> None:
    for ending in INDEXED_ENDINGS:
        path = work_dir / f"{corpus.path}{ending}"
        if not os.access(path, os.R_OK):
            raise DataError(
                f"{key} names {corpus.path}, but {path} {'cannot be read' if path.exists() else 'does not exist'}: "
                "give the path of a dataset without its ending"
            )


def check_run(config: Config, run: Run) -> None:
    """Whether the run has steps left, nobody asked it to stop, and its folder can be written.

    Raises ConfigError.
    """
    found = resumable_manifest(run.dir) if config.checkpoint.resume else None
    if found is not None and found[1].step >= config.run.num_steps:
        raise ConfigError(
            f"{run.dir} is complete: step {found[1].step} of {config.run.num_steps}; "
            "raise run.num_steps or choose another run.dir"
        )
    if (run.dir / STOP_FILE).exists():
        raise ConfigError(f"{run.dir / STOP_FILE} asks this run not to train: remove that file to submit it")
    existing = next(folder for folder in (run.folder, *run.folder.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is no folder" if not existing.is_dir() else "cannot be written to"
        raise ConfigError(f"run.dir {run.dir} cannot be made, for {existing} {what}: choose another")


def check_queue(run: Run) -> None:
    """Two jobs must not train one run at a time. Raises ConfigError."""
    try:
        job_ids = (run.folder / JOB_IDS_FILE).read_text(encoding="utf-8").split()
    except OSError:
        return
    for job_id in job_ids[-1:]:
        state = slurm.job_state(job_id)
        if state is not None:
            raise ConfigError(
                f"job {job_id} of {run.dir} is {state}: scancel it first, or let this one follow it by "
                f"--dependency afterany:{job_id}"
            )


def write_job(job: Job, script: str, configs: list[Config]) -> None:
    """The script, every run's resolved configuration and, where a cluster is named, its plan, before anything is
    submitted. Raises ConfigError."""
    try:
        for run, config in zip(job.runs, configs, strict=True):
            run.folder.mkdir(parents=True, exist_ok=True)
            replace_file(run.config, dump_yaml(config).encode())
            if job.settings.cluster is not None:
                replace_file(run.dir / PLAN_FILE, _plan_text(config, job.settings, job.settings.cluster).encode())
            # What bounds restarts has to be known before training first comes to write it. Of a run that has a
            # checkpoint the record stays until training goes on: until then it says what the checkpoint is of.
            if not resumable_checkpoints(run.dir):
                replace_file(run.dir / CONFIG_FILE, dump_yaml(config).encode())
        replace_file(job.script, script.encode())
    except OSError as error:
        raise ConfigError(
            f"{error.filename or job.script} cannot be written ({error.strerror}): choose a run.dir that can"
        ) from None


def _plan_text(config: Config, settings: JobSettings, cluster: str) -> str:
    """What `megamoe plan --json` prints: monitoring shows it beside what the run does."""
    from megamoe.plan.report import tree_report

    return json.dumps(tree_report(_plan_of(config, settings, cluster), ()), indent=2) + "\n"


def note_job(job: Job, job_id: str) -> None:
    """So that the next submission can ask after it. OSErrors pass."""
    for run in job.runs:
        with open(run.folder / JOB_IDS_FILE, "a", encoding="utf-8") as file:
            file.write(f"{job_id}\n")
