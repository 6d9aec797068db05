"""What decides which parameters are updated, and reduced, together. No torch."""

import math
from typing import NamedTuple

from megamoe.config.schema import Config, FinetuneConfig, OptimizerConfig
from megamoe.errors import ConfigError
from megamoe.topology.parameters import Parameter, param_table
from megamoe.topology.stages import chunk_parameters

MAX_REDUCE_BUCKET_ELEMENTS = 100_000_000


# Kinds of parameters in each part that finetune.freeze can name. The head of a classifier is in none.
_PARTS = {
    "routers": {"router"},
    "experts": {"expert"},
    "dense": {"embedding", "norm", "attention", "ffn", "mix", "output"},
    "embeddings": {"embedding"},
    "norms": {"norm"},
    "attention": {"attention"},
    "ffn": {"ffn", "mix"},
    "output": {"output"},
}


def is_frozen(parameter: Parameter, finetune: FinetuneConfig) -> bool:
    """Whether training leaves the parameter as it is: it has no gradient and no optimizer state."""
    return any(parameter.kind in _PARTS[part] for part in finetune.freeze)


def check_all_train(config: Config) -> None:
    """Raises ConfigError where a pipeline stage has nothing to train: no optimizer can be made of that."""
    pipeline, virtual = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    if not config.finetune.freeze:
        return
    table = param_table(config.model, config.moe)
    for stage in range(pipeline):
        held = (
            parameter
            for chunk in range(virtual)
            for parameter in chunk_parameters(
                table, num_layers=config.model.num_layers, pipeline=pipeline, virtual=virtual, pipeline_rank=stage,
                chunk=chunk,
            )
        )  # fmt: skip
        if all(is_frozen(parameter, config.finetune) for parameter in held):
            where = "" if pipeline == 1 else f" on pipeline stage {stage}"
            instead = "freeze less" if pipeline == 1 else "freeze less, or use parallel.pipeline_parallel_size 1"
            raise ConfigError(
                f"finetune.freeze [{', '.join(config.finetune.freeze)}] leaves nothing to train{where}: {instead}"
            )


class UpdateKind(NamedTuple):
    """Parameters of one kind are one optimizer group; groups are in the order of their kinds."""

    is_expert: bool
    is_exempt: bool  # from weight decay
    lr_scale: float  # multiplies the schedule


def update_kind(parameter: Parameter, optimizer: OptimizerConfig) -> UpdateKind:
    """The scale is 1 for dense parameters; "inverse_sqrt_experts" counts the experts of the parameter's own layer."""
    is_expert, scale = parameter.kind == "expert", 1.0
    if is_expert and optimizer.expert_lr_scale == "inverse_sqrt_experts":
        scale = 1.0 / math.sqrt(parameter.shape[parameter.expert_dim or 0])
    elif is_expert:
        scale = float(optimizer.expert_lr_scale)
    return UpdateKind(is_expert, parameter.is_bias_or_norm and not optimizer.decay_norms_and_biases, scale)


def reduce_bucket_elements(num_local_elements: int) -> int:
    """Elements of the bucket that a rank's gradients are gathered in before they are reduced."""
    return max(2, min(MAX_REDUCE_BUCKET_ELEMENTS, num_local_elements + num_local_elements % 2))
