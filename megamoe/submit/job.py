"""What a job asks of SLURM, of containers and of its environment: typed, from a site's file and the command line."""

import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megamoe.config.keys import accepted
from megamoe.config.loading import read_settings
from megamoe.config.schema import Config, CountOrZero, PositiveInt, Section
from megamoe.errors import ConfigError

COMMAND_LINE = "the command line"
SIGNAL_EARLY_SECONDS = 60  # SLURM sends a signal up to this much before the time that it was asked for
MOST_SIGNAL_SECONDS = 65_535  # SLURM's own limit
_USUAL_SIGNAL_SECONDS, _LEAST_SIGNAL_SECONDS = 600, 60
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    r"|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)|(?P<m>\d+)(?::(?P<ms>\d+))?)$"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]")


class JobSettings(Section):
    """One job. Lists of the command line are added to those of the file, other values win over it."""

    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt | None = None  # None: gpus_per_node
    gpus_per_node: CountOrZero | None = None  # None or 0: SLURM is asked for none
    cpus_per_rank: PositiveInt | None = None
    memory_per_node: str | None = None  # as SLURM writes it: 64G; 0: all of it
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None  # nodes, as SLURM writes lists of them
    dependency: str | None = None
    time: str | PositiveInt | None = None  # as SLURM writes it: minutes, 24:00:00, 2-12; None: the partition's
    signal_seconds: Annotated[int, Field(ge=1, le=MOST_SIGNAL_SECONDS)] | None = None
    # before the time limit, when ranks are asked to save; None: checkpoint.save_timeout_seconds, at most ten minutes
    # and a tenth of `time`
    requeue: bool = True  # queue the job again after an interruption or a failure
    preflight: bool = True  # test the nodes before ranks are started
    grace_seconds: PositiveInt = 60  # how long the other ranks may go on when one has ended
    job_name: str | None = None  # None: the last part of run.dir
    array_limit: PositiveInt | None = None  # of several runs, how many at a time
    launcher: Literal["srun", "torchrun"] = "srun"
    container: Literal["none", "pyxis", "apptainer"] = "none"
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()  # SOURCE:TARGET
    python: str | None = None  # None: the one that submits; in a container python3
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # shell lines, before anything of megamoe
    environment: Mapping[str, str] = {}
    sbatch_options: tuple[str, ...] = ()  # more options of sbatch, as in --switches=1
    srun_options: tuple[str, ...] = ()
    cluster: str | None = None  # of `megamoe plan`: what does not fit its memory is not submitted

    @property
    def world_size(self) -> int:
        return self.nodes * self.num_ranks_per_node

    @property
    def num_ranks_per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1


def read_job_settings(path: str | None, given: Mapping[str, Any]) -> JobSettings:
    """The settings of a file, if there is one, and over them those of the command line.

    Raises ConfigError, one sentence: which key, where, and what is valid.
    """
    below = {} if path is None else read_settings(Path(path))
    _check_keys(below, path or "")
    settings = _validated(below, path or COMMAND_LINE)
    tree = settings.model_dump(mode="json")
    for key, value in given.items():
        if isinstance(value, list):
            tree[key] = [*tree[key], *value]
        elif isinstance(value, Mapping):
            tree[key] = {**tree[key], **value}
        else:
            tree[key] = value
    settings = _validated(tree, COMMAND_LINE)
    check_settings(settings)
    return settings


def check_settings(settings: JobSettings) -> None:
    """What several settings must agree on. Raises ConfigError."""
    for key, value in settings.model_dump(mode="json").items():
        _check_text(key, value)
    _check_sizes(settings)
    _check_time(settings)
    _check_container(settings)
    for name in settings.environment:
        if _VARIABLE.fullmatch(name) is None:
            raise ConfigError(f'environment names "{name}": use letters, digits and _, as in NCCL_DEBUG')
    for option in settings.sbatch_options:
        if not option.startswith("-"):
            raise ConfigError(f'sbatch_options holds "{option}": write an option of sbatch, as in --switches=1')


def time_seconds(time: str | int) -> int | None:
    """Seconds of a time limit as SLURM reads it; None for no limit. Raises ConfigError for what is none."""
    text = str(time).strip()
    if text.lower() in ("infinite", "unlimited"):
        return None
    found = _TIME.match(text)
    if found is None:
        raise ConfigError(f'time is "{time}": write minutes, or hours as in 24:00:00, or days as in 2-12:00:00')
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    hours = 24 * part["days"] + part["dh"] + part["h"]
    minutes = 60 * hours + part["dm"] + part["hm"] + part["m"]
    return 60 * minutes + part["ds"] + part["hs"] + part["ms"]


def signal_seconds(settings: JobSettings, config: Config) -> int:
    """How long before its time limit a job is asked to save."""
    if settings.signal_seconds is not None:
        return settings.signal_seconds
    seconds = min(_USUAL_SIGNAL_SECONDS, math.ceil(config.checkpoint.save_timeout_seconds))
    limit = None if settings.time is None else time_seconds(settings.time)
    return seconds if limit is None else max(_LEAST_SIGNAL_SECONDS, min(seconds, limit // 10))


def _check_sizes(settings: JobSettings) -> None:
    ranks, gpus = settings.num_ranks_per_node, settings.gpus_per_node
    if gpus and ranks > gpus:
        raise ConfigError(f"ranks_per_node {ranks} is more than gpus_per_node {gpus}: use 1 to {gpus}")


def _check_time(settings: JobSettings) -> None:
    limit = None if settings.time is None else time_seconds(settings.time)
    if limit is None:
        return
    needed = SIGNAL_EARLY_SECONDS + (settings.signal_seconds or _LEAST_SIGNAL_SECONDS)
    if limit <= needed and settings.signal_seconds is not None:
        raise ConfigError(
            f"signal_seconds {settings.signal_seconds} leaves nothing of time {settings.time}, for SLURM may signal "
            f"{SIGNAL_EARLY_SECONDS} s early: use a time of more than {needed} s"
        )
    if limit <= needed:
        raise ConfigError(
            f"time {settings.time} is too short to train and save in: use more than {needed} s, or signal_seconds"
        )


def _check_container(settings: JobSettings) -> None:
    image, kind = settings.container_image, settings.container
    if kind == "none" and (image is not None or settings.container_mounts):
        raise ConfigError("container_image and container_mounts mean nothing to container none: use pyxis or apptainer")
    if kind != "none" and image is None:
        wanted = "an image that enroot knows" if kind == "pyxis" else "a .sif file"
        raise ConfigError(f"container {kind} needs container_image: give {wanted}")
    for mount in settings.container_mounts:
        if not mount.startswith("/") or ":" not in mount:
            raise ConfigError(f'container_mounts holds "{mount}": write SOURCE:TARGET, as in /data:/data')


def _check_text(key: str, value: Any) -> None:
    """Lines and control characters would end what they stand in."""
    texts = [value] if isinstance(value, str) else [*value.values()] if isinstance(value, dict) else value
    for text in texts if isinstance(texts, list) else []:
        if isinstance(text, str) and key != "environment" and (_FORBIDDEN.search(text) or not text.strip()):
            raise ConfigError(f"{key} is {json.dumps(text)}: write one line of text")
        if "\0" in str(text):
            raise ConfigError(f"{key} holds a NUL character: leave it out")


def _check_keys(tree: Mapping[Any, Any], where: str) -> None:
    for key in tree:
        if key not in JobSettings.model_fields:
            near = difflib.get_close_matches(str(key).replace("-", "_"), JobSettings.model_fields, n=1, cutoff=0.6)
            hint = f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(JobSettings.model_fields)}"
            raise ConfigError(f'unknown key "{key}" in {where}: {hint}')


def _validated(tree: Mapping[str, Any], where: str) -> JobSettings:
    try:
        return JobSettings.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        key = str(error.errors(include_url=False)[0]["loc"][0])
        field = JobSettings.model_fields[key]
        valid = "texts by name" if key == "environment" else accepted(field.annotation, tuple(field.metadata))
        raise ConfigError(f"{key} is {json.dumps(tree[key])} in {where}: it must be {valid}") from None
