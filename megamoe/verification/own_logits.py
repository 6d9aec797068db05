"""Logits of a megamoe checkpoint under any layout, through the very code that training runs. No token is dropped.

    n sequences   s positions   V rows of the vocabulary
"""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.config.loading import override_config
from megamoe.config.schema import Config
from megamoe.errors import ConversionError
from megamoe.verification.windows import window_config, window_of

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

# Nothing is trained: the least an engine can hold, in full precision.
_FORWARD_ONLY = (
    "run.precision=fp32", "run.micro_batch_size=1", "run.device=cpu", "optimizer.name=sgd", "optimizer.momentum=0.0",
    "parallel.zero_stage=0", "parallel.recompute=none", "optimizer.expert_lr_scale=1.0",
    "finetune.freeze=[]",
)  # fmt: skip
_ONE_RANK = (
    "parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.expert_parallel_size=1",
    "parallel.virtual_pipeline_parallel_size=1", "parallel.expert_tensor_parallel_size=1",
    "parallel.sequence_parallel=false", "parallel.all_to_all=flat", "parallel.all_to_all_chunks=1",
)  # fmt: skip


def own_logits(
    checkpoint: Path,
    token_ids: np.ndarray,
    *,
    layers: tuple[int, int] | None = None,
    layout: Sequence[str] = (),
    num_ranks: int = 1,
    rounded_to: str | None = None,
    timeout_seconds: float = 3600.0,
) -> np.ndarray:
    """fp32 logits [n, s, V] of token ids int64 [n, s], on new CPU ranks of this machine.

    layers: [first, last) of them alone, between embedding and output. layout: settings "parallel.key=value"; none: one
    rank. rounded_to: "BF16" or "F16" rounds the weights first, as an export of that type does. Raises ConversionError
    where the ranks fail; they have said why.
    """
    from megamoe.launch.local import run_local

    config = forward_config(checkpoint, layers, token_ids.shape[1], layout, num_ranks)
    with tempfile.TemporaryDirectory(prefix="megamoe-verify-") as scratch:
        np.save(f"{scratch}/ids.npy", token_ids.astype(np.int64))
        payload = {
            "config": config.model_dump(mode="json"), "checkpoint": str(checkpoint), "scratch": scratch,
            "layers": layers, "rounded_to": rounded_to,
        }  # fmt: skip
        result = run_local(
            f"{__name__}:run_rank", payload, num_ranks=num_ranks, preload=("megamoe.training.main",),
            timeout_seconds=timeout_seconds,
        )  # fmt: skip
        if result.exit_code:
            raise ConversionError(f"the logits of {checkpoint} could not be computed: a rank failed, see above")
        parts = [np.load(path) for path in sorted(Path(scratch).glob("logits_*.npy"))]
        return np.concatenate(parts, axis=-1)


def forward_config(
    checkpoint: Path, layers: tuple[int, int] | None, seq_length: int, layout: Sequence[str], num_ranks: int
) -> Config:
    """The checkpoint's configuration (of `layers` alone) for a forward pass of this length under this layout."""
    with Checkpoint.open(checkpoint) as opened:
        config = config_of(opened)
    if layers is not None:
        config = window_config(config, *layers)
    more = (*_FORWARD_ONLY, *_ONE_RANK, *layout)
    config = override_config(config, more, str(checkpoint))
    sizes = config.parallel
    data_parallel = num_ranks // (sizes.tensor_parallel_size * sizes.pipeline_parallel_size)
    sizes_of_run = (f"model.seq_length={seq_length}", f"run.global_batch_size={max(1, data_parallel)}")
    return override_config(config, sizes_of_run, str(checkpoint))


def run_rank(payload: dict[str, Any]) -> None:
    """A rank's side of `own_logits`."""
    import torch.distributed as dist

    from megamoe.launch.environment import rank_environment
    from megamoe.training.build import build_trainer
    from megamoe.training.distributed import initialize_distributed

    config = Config.model_validate(payload["config"])
    device = initialize_distributed(rank_environment(), config.parallel.timeout_seconds)
    trainer = build_trainer(config, device)
    token_ids = np.load(f"{payload['scratch']}/ids.npy")
    folder, layers = Path(payload["checkpoint"]), payload["layers"]
    logits = logits_of(trainer, folder, token_ids, layers=layers, rounded_to=payload["rounded_to"])
    if logits is not None:
        np.save(f"{payload['scratch']}/logits_{trainer.groups.coordinates.tensor:05d}.npy", logits)
    dist.barrier()
    trainer.close()
    dist.destroy_process_group()


def logits_of(
    trainer: "Trainer",
    checkpoint: Path,
    token_ids: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    rounded_to: str | None = None,
) -> np.ndarray | None:
    """Load the weights and compute this tensor rank's part of the logits, fp32 [n, s, V / t], drops off.

    Every data-parallel rank computes the same; the last stage of the first of them returns it, all others None.
    Collective over all ranks.
    """
    import torch

    from megamoe.data.batches import MicroBatch
    from megamoe.training.restore import load_weights_of
    from megamoe.training.step import Batch

    with Checkpoint.open(checkpoint) as opened:
        chosen = opened if layers is None else window_of(opened, config_of(opened), *layers)
        with contextlib.closing(chosen):
            load_weights_of(trainer, chosen)
    if rounded_to is not None:
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[rounded_to]
        for local in trainer.parameters:
            local.tensor.data.copy_(local.tensor.data.to(dtype))
    # The interleaved schedule wants a multiple of the pipeline size: the last sequence is repeated, and left out below.
    num_more = -len(token_ids) % trainer.groups.grid.pipeline
    rows = [*token_ids, *[token_ids[-1]] * num_more]
    micro_batches = [MicroBatch(row[None], row[None]) for row in rows]
    with torch.no_grad(), trainer.evaluating(drop_tokens=False):
        logits = trainer.schedule.logits(Batch(iter(micro_batches), len(micro_batches)))
    if logits is None or trainer.groups.coordinates.data != 0:
        return None
    return torch.cat([each.float() for each in logits[: len(token_ids)]]).cpu().numpy()
