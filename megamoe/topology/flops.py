"""FLOPs that one token costs in the whole model: what it takes to train it, however it is done, and with recompute.

Active weights only: of experts, those that a token is sent to.
"""

from typing import Literal

from megamoe.config.schema import Config
from megamoe.topology.parameters import dimensions, experts_by_layer


def model_flops_per_token(config: Config, *, attention: Literal["causal", "full"] = "full") -> float:
    """Forward and backward FLOPs of one token in the whole model: 6 for each active weight of a product, and attention.

    `full` counts all s x s scores, as Megatron-LM's formula does (Narayanan et al. 2021, eq. 3, less recompute, which
    is no work of the model); `causal` half of them. Norms, biases, embedding and softmax are not counted.
    """
    return 3 * (layer_forward_flops_per_token(config, attention=attention) + _logit_flops(config))


def hardware_flops_per_token(config: Config, *, attention: Literal["causal", "full"] = "full") -> float:
    """As `model_flops_per_token`, and what full or selective recompute computes again in the layers."""
    again = layer_forward_flops_per_token(config, attention=attention)
    if config.parallel.recompute == "selective":
        again = config.model.num_layers * _core_flops(config, attention)
    elif config.parallel.recompute == "none":
        again = 0.0
    return model_flops_per_token(config, attention=attention) + again


def layer_forward_flops_per_token(config: Config, *, attention: Literal["causal", "full"] = "full") -> float:
    """Forward FLOPs of one token in all layers, without the logits."""
    model, moe, sizes = config.model, config.moe, dimensions(config.model, config.moe)
    matrices = 3 if model.activation == "swiglu" else 2
    heads = sizes.head_dim * (2 * sizes.heads + 2 * sizes.query_groups)
    total = model.num_layers * (2.0 * sizes.hidden * heads + _core_flops(config, attention))
    experts = experts_by_layer(model, moe)
    total += 2.0 * (model.num_layers - len(experts)) * matrices * sizes.hidden * sizes.ffn
    for count in experts.values():
        width = min(moe.top_k, count) * sizes.expert_ffn + (sizes.shared_expert_ffn or 0)
        total += 2.0 * sizes.hidden * (matrices * width + count)
    return total


def _core_flops(config: Config, attention: Literal["causal", "full"]) -> float:
    sizes = dimensions(config.model, config.moe)
    full = 4.0 * config.model.seq_length * sizes.heads * sizes.head_dim
    return full / 2 if attention == "causal" else full


def _logit_flops(config: Config) -> float:
    sizes = dimensions(config.model, config.moe)
    return 2.0 * sizes.hidden * (config.model.num_labels or sizes.vocab)
