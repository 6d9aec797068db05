"""GPUs or CPU, decided before torch is loaded: both engines look for CUDA once, when they are imported."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

from megamoe.errors import ConfigError
from megamoe.launch.environment import RankEnvironment

VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
QUERY_TIMEOUT_SECONDS = 20.0


def num_visible_gpus(env: Mapping[str, str]) -> int:
    """NVIDIA GPUs that a process with this environment could use."""
    if VISIBLE in env:
        chosen = env[VISIBLE].split(",")
        # CUDA ignores what follows the first entry it does not know, and "-1" is the usual way to hide all.
        return next((n for n, name in enumerate(chosen) if name.strip() in ("", "-1")), len(chosen))
    if GPU_FOLDER.is_dir():
        return len(list(GPU_FOLDER.iterdir()))
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def choose_device(
    setting: Literal["auto", "cpu", "cuda"], num_local_ranks: int, env: Mapping[str, str], *, one_gpu_each: bool = False
) -> Literal["cpu", "cuda"]:
    """Where the ranks of this machine run. "auto" takes GPUs only where every rank has one of its own.

    one_gpu_each: the launcher shows every rank a single GPU, its own (srun --gpus-per-task 1).
    Raises ConfigError when "cuda" is asked for and there are not enough.
    """
    if setting == "cpu":
        return "cpu"
    num_gpus = num_visible_gpus(env)
    if num_gpus >= num_local_ranks or (one_gpu_each and num_gpus == 1):
        return "cuda"
    if setting == "cuda":
        valid = f"start {num_gpus} ranks here, or use" if num_gpus else "use"
        raise ConfigError(
            f"run.device cuda needs a GPU for each of the {num_local_ranks} ranks of this machine, and {num_gpus} "
            f"{'is' if num_gpus == 1 else 'are'} visible: {valid} run.device cpu"
        )
    return "cpu"


def hide_gpus(env: MutableMapping[str, str]) -> None:
    """Make torch and both engines, in processes with this environment, find no CUDA."""
    env[VISIBLE] = ""


def settle_device(
    setting: Literal["auto", "cpu", "cuda"], environment: RankEnvironment, local_ranks: int | None,
    env: MutableMapping[str, str],
) -> None:  # fmt: skip
    """Settle on GPUs or CPU for the process whose variables are `env`, and its children, before anything loads torch.

    local_ranks: how many it starts itself; None: it is a rank. Raises ConfigError as `choose_device`.
    """
    num_local_ranks = local_ranks or environment.local_world_size
    one_gpu_each = environment.source == "srun" and not local_ranks
    if choose_device(setting, num_local_ranks, env, one_gpu_each=one_gpu_each) == "cuda":
        return
    num_gpus = num_visible_gpus(env)
    if num_gpus and setting == "auto" and environment.rank == 0:
        note = f"{num_local_ranks} ranks share this machine, which shows {num_gpus} GPUs: running on the CPU"
        print(note, file=sys.stderr)  # stdout may be JSON
    hide_gpus(env)
