"""A rank that computes: joins the world, has the model while it works, leaves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.inference.model import ForwardModel, build_forward_model
from megamoe.launch.environment import rank_environment
from megamoe.training import engine_warnings
from megamoe.training.distributed import bound_waits, initialize_distributed

engine_warnings.silence()


@contextmanager
def forward_model(config: Config, checkpoint: Path) -> Iterator[ForwardModel]:
    """The model on this rank of the world that the environment describes. Every wait is bounded by
    parallel.timeout_seconds. An error leaves all standing: a rank that took its connections down would make its peers
    fail before it is heard."""
    device = initialize_distributed(rank_environment(), config.parallel.timeout_seconds)
    model = build_forward_model(config, checkpoint, device)
    bound_waits(config.parallel.timeout_seconds)
    yield model
    dist.barrier()
    model.close()
    dist.destroy_process_group()
