"""What the benchmarks of a real training step have in common: ranks on this machine, a trainer on each, random tokens.

A benchmark gives `run_on_ranks` a function of its own module. Every rank calls it with its trainer's configuration
and returns something that JSON can hold.
"""

import importlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.errors import MegamoeError
from megamoe.launch.local import run_local

TIMEOUT_SECONDS = 300.0
PRELOAD = ("megamoe.training.main", "local_runs")


class RandomSamples:
    """A sample source of random token ids: what a step costs does not depend on what the tokens say."""

    num_samples = 1 << 30

    def __init__(self, config: Config) -> None:
        self.vocab_size, self.length = config.model.vocab_size, config.model.seq_length + 1

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1], a function of `index` alone."""
        return np.random.default_rng(index).integers(0, self.vocab_size, self.length)


def run_on_ranks(module: str, function: str, config: Config, num_ranks: int, **arguments: Any) -> list[Any]:
    """Call module.function(config, **arguments) on every rank of a new world; return all values in rank order.

    Raises ConfigError or TopologyError for a layout that is impossible, MegamoeError if a rank fails.
    """
    validate(config, num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        payload = {
            "module": module, "function": function, "arguments": arguments, "folder": folder,
            "config": config.model_dump(mode="json"),
        }  # fmt: skip
        result = run_local(
            "local_runs:on_rank", payload, num_ranks=num_ranks, preload=PRELOAD, timeout_seconds=TIMEOUT_SECONDS
        )
        if result.failure is not None:  # the reason has been printed
            raise MegamoeError(f"{num_ranks} ranks did not get to the end")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def on_rank(payload: dict[str, Any]) -> None:
    """What each rank does: joins the world, calls the benchmark's function, leaves its value."""
    import torch.distributed as dist

    from megamoe.launch.environment import rank_environment
    from megamoe.training.distributed import initialize_distributed

    config = Config.model_validate(payload["config"])
    environment = rank_environment()
    initialize_distributed(environment, config.parallel.timeout_seconds)
    function = getattr(importlib.import_module(payload["module"]), payload["function"])
    value = function(config, **payload["arguments"])
    (Path(payload["folder"]) / f"{environment.rank}.json").write_text(json.dumps(value))
    dist.barrier()
    dist.destroy_process_group()


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def take_steps(trainer: Any, samples: RandomSamples, num_steps: int) -> None:
    """Real training steps, as the loop takes them."""
    from megamoe.training.loop import local_batch

    for _ in range(num_steps):
        size = trainer.config.run.global_batch_size
        trainer.train_step(local_batch(trainer, samples, trainer.samples, size), size)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def layout_name(config: Config, num_ranks: int) -> str:
    """Short: "8 ranks tp2 pp2 ep2 dp2 ZeRO-1"."""
    p = config.parallel
    sizes = {
        "tp": p.tensor_parallel_size, "pp": p.pipeline_parallel_size, "vpp": p.virtual_pipeline_parallel_size,
        "ep": p.expert_parallel_size, "etp": p.expert_tensor_parallel_size,
        "dp": num_ranks // (p.tensor_parallel_size * p.pipeline_parallel_size),
    }  # fmt: skip
    folded = "".join(f" {name}{size}" for name, size in sizes.items() if size > 1)
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}{folded} ZeRO-{p.zero_stage}"


def split_layout(text: str) -> tuple[int, list[str]]:
    """ "8 parallel.tensor_parallel_size=2 ..." -> 8 and the overrides. Raises MegamoeError for another form."""
    ranks, *overrides = text.split()
    if not ranks.isdecimal() or int(ranks) < 1:
        raise MegamoeError(f'"{text}" does not begin with a number of ranks, as "8 parallel.zero_stage=2" does')
    return int(ranks), overrides


def configuration(preset: str, *overrides: str) -> Config:
    """A configuration for steps on random tokens."""
    return load_config(preset, overrides)


def machine() -> str:
    """One line about where this was measured."""
    cores = torch.multiprocessing.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores} cores, {platform.machine()}{gpu}, torch {torch.__version__}"
