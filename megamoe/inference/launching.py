"""From a command to its ranks: new ones of this machine, or the one that torchrun or srun has made of this process."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from megamoe.config.schema import Config
from megamoe.errors import MegamoeError
from megamoe.launch.devices import settle_device
from megamoe.launch.environment import rank_environment
from megamoe.launch.refusal import refused


def compute_on_ranks(
    entry: str, prepare: Callable[[int], tuple[Config, Mapping[str, Any]]], *, local_ranks: int | None
) -> int:
    """Run "module:function"(payload) on every rank; the exit code, of what has been printed if it is not 0.

    prepare: from the number of ranks the configuration and the payload, which is JSON. It is called in the process that
    starts ranks, or in each one that is a rank: what it raises is `refused`. local_ranks: new ranks here; None: this
    process is one, alone or of a launcher's.
    """
    environment = rank_environment()
    try:
        config, payload = prepare(local_ranks or environment.world_size)
        settle_device(config.run.device, environment, local_ranks, os.environ)
    except MegamoeError as error:
        return refused(error, environment)
    payload = dict(payload) | {"config": config.model_dump(mode="json")}
    if local_ranks:
        from megamoe.launch.local import run_local

        result = run_local(
            entry, payload, num_ranks=local_ranks, preload=("megamoe.inference.worker",),
            stop_seconds=config.parallel.timeout_seconds,
        )  # fmt: skip
        return result.exit_code
    from megamoe.host_memory import keep_freed_memory

    keep_freed_memory()
    module, _, function = entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(payload)
    except MegamoeError as error:
        if environment.world_size == 1:
            raise
        print(f"megamoe: error on rank {environment.rank}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
