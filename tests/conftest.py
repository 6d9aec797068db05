"""What every test starts from: no leftovers of a launcher in the environment, and no user settings of ours."""

import os

import pytest
from hypothesis import HealthCheck, settings

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "MEGAMOE_INIT_METHOD", "SLURM_PROCID", "SLURM_STEP_ID",
)  # fmt: skip


# The same examples in every run, however slow the machine is; --hypothesis-profile=default draws others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    for name in LAUNCHER_VARIABLES:  # the suite may itself run inside a SLURM job
        os.environ.pop(name, None)
    os.environ.setdefault("WANDB_MODE", "disabled")
    # At 19, whatever else fills the cores of this machine leaves a process that tests wait for a few percent of one.
    os.environ.setdefault("MEGAMOE_TRACKER_NICENESS", "0")
    # Tensors of tests are small: a second thread waits at barriers, for long when anything else runs on the machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
