"""Which tracking services a run has, and under which name Weights & Biases knows it."""

import os
import re
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.runs.events import EVENTS_FILE

RUN_ID_FILE = "wandb_run_id"
NICENESS, NICENESS_VARIABLE = 19, "MEGAMOE_TRACKER_NICENESS"  # training goes first, unless the user says otherwise
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def tracker_specs(
    config: Config, *, resume_step: int, run_id: str | None, details: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a Tracker takes, for each service of the run. `details` go beside the configuration."""
    common = {"run_dir": str(Path(config.run.dir).resolve()), "config": config.model_dump(mode="json"),
              "resume_step": resume_step, "events_position": _size(Path(config.run.dir) / EVENTS_FILE),
              "close_seconds": config.monitor.wandb_timeout_seconds, "niceness": niceness()}  # fmt: skip
    specs = []
    if run_id is not None and wandb_mode(config) != "disabled":
        wandb = {"service": "wandb", "mode": wandb_mode(config), "run_id": run_id, "details": dict(details)}
        specs.append(common | wandb)
    if config.monitor.tensorboard:
        specs.append(common | {"service": "tensorboard"})
    return specs


def niceness() -> int:
    """Of the processes that feed tracking services. Raises ConfigError where the user's is none."""
    wanted = os.environ.get(NICENESS_VARIABLE, "")
    if not re.fullmatch(r"1?\d|", wanted):
        raise ConfigError(f'{NICENESS_VARIABLE} is "{wanted}": use 0 (as training) to 19 (only what training leaves)')
    return int(wanted or NICENESS)


def wandb_mode(config: Config) -> str:
    """disabled, offline or online: WANDB_MODE, where it is set and the configuration does not turn it off."""
    if config.monitor.wandb_mode == "disabled":
        return "disabled"
    chosen = os.environ.get("WANDB_MODE", "").lower()
    chosen = {"dryrun": "offline", "run": "online"}.get(chosen, chosen)
    return chosen if chosen in ("disabled", "offline", "online") else config.monitor.wandb_mode


def wandb_run_id(config: Config, saved: str | None) -> str:
    """WANDB_RUN_ID, else what a checkpoint has `saved`, else what the run's folder says, else a new one.

    It is in the run's folder afterwards, so that an attempt that never gets to a checkpoint is the same run.
    """
    path = Path(config.run.dir) / RUN_ID_FILE
    goes_on = config.checkpoint.resume
    candidates = [os.environ.get("WANDB_RUN_ID"), saved, _read(path) if goes_on else None]
    found = next((each for each in candidates if each is not None and RUN_ID.fullmatch(each)), None)
    if found is None:
        found = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    replace_file(path, f"{found}\n".encode())
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(100).strip()
    except OSError:
        return None
