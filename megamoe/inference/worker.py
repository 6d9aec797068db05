"""A rank that computes: joins the world, has the model while it works, leaves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.training import engine_warnings

engine_warnings.silence()  # before the engines are imported

import torch.distributed as dist  # noqa: E402

from megamoe.config.schema import Config  # noqa: E402
from megamoe.launch.environment import rank_environment  # noqa: E402
from megamoe.model import cpu_bridge  # noqa: E402

cpu_bridge.apply_before_import()

from megamoe.inference.model import ForwardModel, build_forward_model  # noqa: E402
from megamoe.training.distributed import bound_waits, initialize_distributed  # noqa: E402


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
