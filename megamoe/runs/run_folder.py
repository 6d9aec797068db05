"""The layout of a run's folder. No torch: the command line looks here before it starts a rank.

    config.yaml     the resolved configuration; plan.json what was planned of it, where it was
    log.txt         what was printed
    metrics.jsonl   one JSON object a line; expert_loads.jsonl, events.jsonl likewise
    wandb_run_id    the run's name in Weights & Biases; wandb/, tensorboard/, trackers.log are the services' own
    checkpoints/    step_00000100/ ..., latest (a text file with the name of the one in force): `megamoe.checkpoint`
"""

import os
from pathlib import Path

from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.folders import LATEST, checkpoint_name, complete_checkpoints, step_of
from megamoe.checkpoint.manifest import Manifest
from megamoe.config.loading import dump_yaml
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError, ConfigError

__all__ = [
    "PLAN_FILE",
    "checkpoint_at",
    "checkpoint_name",
    "checkpoints_path",
    "prepare",
    "resumable_checkpoints",
    "resumable_manifest",
    "step_of",
]

PLAN_FILE = "plan.json"


def checkpoints_path(run_dir: str | os.PathLike[str]) -> Path:
    return Path(run_dir) / "checkpoints"


def resumable_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run: the one in force, which `latest` names, then those before it, newest first.

    Raises CheckpointError if `latest` names none.
    """
    folder = checkpoints_path(run_dir)
    found = complete_checkpoints(folder)
    try:
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        name = None
    stood_aside = name is not None and any(folder.glob(f".{name}.*.aside"))  # until `recover` has put it back
    if name is not None and not stood_aside and (step_of(name) is None or not (folder / name).is_dir()):
        raise CheckpointError(
            f'{folder / LATEST} names "{name}", which is no checkpoint beside it: write the name of one of '
            f"{sorted(p.name for p in folder.iterdir() if step_of(p.name) is not None)} into it, or remove it "
            "to start anew"
        )
    return [path for path in found if step_of(path.name) <= step_of(found[0].name)]


def resumable_manifest(run_dir: str | os.PathLike[str]) -> tuple[Path, Manifest] | None:
    """The first of `resumable_checkpoints` whose manifest is whole, with it; None where there is none."""
    for folder in resumable_checkpoints(run_dir):
        try:
            return folder, Manifest.read(folder)
        except CheckpointError:  # said, and decided about, by the ranks when they load
            continue
    return None


def checkpoint_at(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: its folder itself, or the one in force of the run folder that it is.

    Raises CheckpointError where there is none.
    """
    folder = Path(path)
    if step_of(folder.name) is not None:
        if folder.is_dir():
            return folder
    elif found := resumable_checkpoints(folder):
        return found[0]
    raise CheckpointError(
        f"checkpoint.load_from {folder} holds no checkpoint: use a run folder, or a folder of its checkpoints/"
    )


def prepare(config: Config) -> None:
    """Make the run's folder and write the resolved configuration into it. Raises ConfigError where that cannot be."""
    folder = Path(config.run.dir)
    try:
        checkpoints_path(folder).mkdir(parents=True, exist_ok=True)
        replace_file(folder / "config.yaml", dump_yaml(config).encode())
    except OSError as error:
        raise ConfigError(
            f"run.dir {folder} cannot be written ({error.strerror}): choose a folder that can be made or written to"
        ) from None
