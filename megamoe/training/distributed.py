"""Join the world: torch.distributed with a bounded wait, seeds, and the CPU bridge, in the order the engines need."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megamoe.launch.environment import RankEnvironment
from megamoe.model import cpu_bridge


def initialize_distributed(environment: RankEnvironment, timeout_seconds: float) -> torch.device:
    """Initialise torch.distributed (NCCL with CUDA, gloo without) and return this rank's device.

    Every collective waits at most `timeout_seconds`. Call before DeepSpeed is imported.
    """
    os.environ.update(environment.as_variables())  # DeepSpeed reads its local rank there
    cpu_bridge.apply_before_import()
    # Megatron overlaps tensor-parallel communication with compute only if kernels start in the order of their launch.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        # A launcher may show each rank its own GPU only (srun --gpus-per-task 1): it is number 0 then.
        device = torch.device("cuda", environment.local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=environment.init_method,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    return device


def bound_waits(timeout_seconds: float) -> None:
    """Make `timeout_seconds` the longest wait in every group that this rank is in, whoever made it.

    DeepSpeed makes groups that would wait for half an hour; torch's own default is not that of the first group.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)
