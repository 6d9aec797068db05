"""What decides which parameters are updated, and reduced, together. No torch."""

import math
from typing import NamedTuple

from megamoe.config.schema import FinetuneConfig, OptimizerConfig
from megamoe.topology.parameters import Parameter

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
