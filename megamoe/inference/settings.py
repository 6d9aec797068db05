"""The configuration of a forward pass: the checkpoint's model, under a layout and precision of its own. No torch."""

from collections.abc import Sequence
from pathlib import Path

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.config.loading import override_config
from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.errors import ConfigError

# What a layout was for in training has no use here, or cannot be had with texts of any length. ZeRO has nothing to
# cut; its stage 1 is the one that goes with every precision.
_ONE_RANK = (
    "parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.expert_parallel_size=1",
    "parallel.virtual_pipeline_parallel_size=1", "parallel.expert_tensor_parallel_size=1",
    "parallel.sequence_parallel=false", "parallel.all_to_all=flat", "parallel.all_to_all_chunks=1",
    "parallel.ranks_per_node=null", "parallel.zero_stage=1", "parallel.recompute=none",
    "optimizer.name=sgd", "optimizer.momentum=0.0", "optimizer.expert_lr_scale=1.0", "guard.action=disabled",
)  # fmt: skip
_SECTIONS = (
    "parallel.", "run.precision", "run.device", "run.micro_batch_size", "moe.eval_capacity_", "data.tokenizer",
    "checkpoint.verify",
)  # fmt: skip
_REFUSED = {
    "parallel.sequence_parallel": "texts of any length do not divide over tensor ranks",
    "parallel.virtual_pipeline_parallel_size": "interleaving only helps where gradients are computed",
    "parallel.zero_stage": "there is no optimizer",
    "parallel.recompute": "there is no backward pass",
}


def forward_config(checkpoint: Path, overrides: Sequence[str] = (), *, num_ranks: int = 1) -> Config:
    """The checkpoint's configuration for forward passes, as `forward_settings`. Raises what that does, and
    CheckpointError."""
    with Checkpoint.open(checkpoint) as opened:
        config = config_of(opened)
    return forward_settings(config, overrides, num_ranks=num_ranks, where=str(checkpoint))


def forward_settings(
    config: Config, overrides: Sequence[str] = (), *, num_ranks: int = 1, where: str = "the model"
) -> Config:
    """A trained model's configuration for forward passes on `num_ranks` ranks; one rank and fp32 where nothing is said.

    overrides: "section.key=value" of the layout (parallel.…), run.precision, run.device, run.micro_batch_size,
    moe.eval_capacity_…, data.tokenizer.…, checkpoint.verify. where: what holds the model, for messages. Raises
    ConfigError for any other and for a classifier, TopologyError where the layout does not fit the ranks.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key in _REFUSED:
            raise ConfigError(f"{key} cannot be set for a forward pass: {_REFUSED[key]}")
        if not key.startswith(_SECTIONS):
            raise ConfigError(
                f"{key} cannot be set for a forward pass: valid are parallel.…, run.precision, run.device, "
                "run.micro_batch_size, moe.eval_capacity_…, data.tokenizer.…, checkpoint.verify"
            )
    if config.model.num_labels:
        raise ConfigError(
            f"{where} is a classifier of {config.model.num_labels} labels, which gives no tokens: name a language "
            "model (a fine-tuning's own validations tell what a classifier can do)"
        )
    config = override_config(config, (*_ONE_RANK, "run.precision=fp32", "run.micro_batch_size=1", *overrides), where)
    sizes = config.parallel
    data_parallel = max(1, num_ranks // (sizes.tensor_parallel_size * sizes.pipeline_parallel_size))
    batch = data_parallel * config.run.micro_batch_size
    config = override_config(config, (f"run.global_batch_size={batch}", "run.batch_size_ramp=null"), where)
    validate(config, num_ranks)
    return config
