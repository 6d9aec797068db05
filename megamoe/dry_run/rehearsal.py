"""Two real steps of a job folded down to a few CPU ranks: real groups, real exchanges, real losses."""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.dry_run.folding import Folded
from megamoe.errors import MegamoeError

NUM_STEPS = 2
TIMEOUT_SECONDS = 240.0


@dataclass(frozen=True)
class Rehearsal:
    """What the steps came to: mean loss and gradient norm of each, the same on all ranks."""

    folded: Folded
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


def rehearse(folded: Folded) -> Rehearsal:
    """Train the tiny job for two steps on random tokens. Raises MegamoeError where a rank fails, hangs, or computes no
    numbers; the rank has said why."""
    from megamoe.launch.local import run_local

    with tempfile.TemporaryDirectory(prefix="megamoe-rehearsal-") as scratch:
        payload = {"config": folded.config.model_dump(mode="json"), "scratch": scratch}
        result = run_local(
            f"{__name__}:run_rank", payload, num_ranks=folded.world_size, preload=("megamoe.training.main",),
            timeout_seconds=TIMEOUT_SECONDS,
        )  # fmt: skip
        if result.exit_code:
            raise MegamoeError("the rehearsal on this machine's ranks failed: see above")
        seen = json.loads((Path(scratch) / "steps.json").read_text())
    if not all(math.isfinite(value) for value in (*seen["losses"], *seen["grad_norms"])):
        raise MegamoeError(f"the rehearsal computed no numbers: losses {seen['losses']}, norms {seen['grad_norms']}")
    return Rehearsal(folded, tuple(seen["losses"]), tuple(seen["grad_norms"]))


def run_rank(payload: dict[str, Any]) -> None:
    """A rank's side of `rehearse`; the first rank of the last stage writes what it saw."""
    import numpy as np
    import torch.distributed as dist

    from megamoe.data.batches import MicroBatch
    from megamoe.launch.environment import rank_environment
    from megamoe.training.build import build_trainer
    from megamoe.training.distributed import initialize_distributed
    from megamoe.training.replicas import check_replicas
    from megamoe.training.step import Batch

    config = Config.model_validate(payload["config"])
    device = initialize_distributed(rank_environment(), config.parallel.timeout_seconds)
    trainer = build_trainer(config, device)
    run, grid, at = config.run, trainer.groups.grid, trainer.groups.coordinates
    count = run.global_batch_size // (run.micro_batch_size * grid.data)
    random = np.random.default_rng(at.data)  # tensor and pipeline ranks of one sample draw the same
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        shape = (count, run.micro_batch_size, config.model.seq_length + 1)
        ids = random.integers(0, config.model.vocab_size, shape)
        batch = Batch((MicroBatch(each[:, :-1], each[:, 1:]) for each in ids), count)
        result = trainer.train_step(batch, run.global_batch_size)
        losses.append(None if result.lm_losses is None else float(result.lm_losses.mean()))
        norms.append(result.grad_norm)
    check_replicas(trainer)
    if (at.pipeline, at.data, at.tensor) == (grid.pipeline - 1, 0, 0):
        (Path(payload["scratch"]) / "steps.json").write_text(json.dumps({"losses": losses, "grad_norms": norms}))
    dist.barrier()
    trainer.close()
    dist.destroy_process_group()
