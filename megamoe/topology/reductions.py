"""Which gradients need a sum that no engine makes: those computed in parts by the ranks of a tensor group. No torch."""

from megamoe.config.schema import ParallelConfig
from megamoe.topology.parameters import Parameter


def is_summed_over_tensor(parameter: Parameter, parallel: ParallelConfig) -> bool:
    """True where each tensor rank holds the whole parameter but only a part of its gradient.

    - Sequence parallelism: norms, what weighs a shared expert, and the biases added after a row-cut product see one
      slice of the sequence each.
    - Routers: tokens are routed slice by slice, or (expert tensor parallelism) from partial expert results.
    - Query and key norms over one head are shared by heads that lie on different ranks.
    - The last bias of an expert is added by one rank of the expert tensor group.
    """
    if parallel.tensor_parallel_size == 1:
        return False
    if parameter.kind == "expert":
        return parallel.expert_tensor_parallel_size > 1 and parameter.tensor_dim is None
    if parameter.tensor_dim is not None or parameter.kind == "head":  # a classifier's sees whole sequences
        return False
    if parameter.kind == "router" or parameter.name.endswith((".q_norm.weight", ".k_norm.weight")):
        return True
    return parallel.sequence_parallel


def is_whole_on_each_tensor_rank(parameter: Parameter, parallel: ParallelConfig) -> bool:
    """True where tensor ranks (for experts: expert tensor ranks) hold copies: a norm counts one of them."""
    if parameter.kind == "expert":
        return parallel.expert_tensor_parallel_size > 1 and parameter.tensor_dim is None
    return parameter.tensor_dim is None
