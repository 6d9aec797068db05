"""Which gradients are summed over the tensor group, and which norms counted once: every parameter, every folding."""

import pytest

from megamoe.config.schema import ModelConfig, MoEConfig, ParallelConfig
from megamoe.topology.parameters import param_table
from megamoe.topology.reductions import is_summed_over_tensor, is_whole_on_each_tensor_rank

MOE = MoEConfig(
    num_experts=4, layer_pattern=2, shared_expert_ffn_hidden_size=12, shared_expert_mix="residual"
)
PAPER = param_table(ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2), MOE)
MODERN = {"normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "tie_embeddings": False}
HEAD_NORM = param_table(ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, qk_norm="head", **MODERN), MOE)
FULL_NORM = param_table(ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, qk_norm="full", **MODERN), MOE)

# By the end of a name, longest first: how the parameter lies on the ranks of a tensor group. Written from the model's
# mathematics, not from the table.
#   cut       each rank holds a part of it
#   slice     whole; sees all tokens, or under sequence parallelism one slice of them
#   part      whole; always computed in parts
#   expert    experts: whole on each expert tensor rank, cut otherwise
LIES = {
    "embedding.weight": "cut", "output.weight": "cut",
    "attention_norm.weight": "slice", "attention_norm.bias": "slice", "ffn_norm.weight": "slice",
    "ffn_norm.bias": "slice", "final_norm.weight": "slice", "final_norm.bias": "slice",
    "attention.qkv.weight": "cut", "attention.qkv.bias": "cut",
    "attention.out.weight": "cut", "attention.out.bias": "slice",
    ".ffn.fc1.weight": "cut", ".ffn.fc1.bias": "cut", ".ffn.fc2.weight": "cut", ".ffn.fc2.bias": "slice",
    ".shared_expert.fc1.weight": "cut", ".shared_expert.fc1.bias": "cut", ".shared_expert.fc2.weight": "cut",
    ".shared_expert.fc2.bias": "slice", "shared_expert_mix.weight": "slice", "shared_expert_mix.bias": "slice",
    "router.weight": "part",
    "experts.fc1.weight": "expert cut", "experts.fc1.bias": "expert cut", "experts.fc2.weight": "expert cut",
    "experts.fc2.bias": "expert whole",
}  # fmt: skip
QK_NORM = {"head": "part", "full": "cut"}


def lies(name: str, qk_norm: str) -> str:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return QK_NORM[qk_norm]
    (found,) = [how for ending, how in LIES.items() if f".{name}".endswith(ending)]
    return found


FAMILIES = [(PAPER, "none"), (HEAD_NORM, "head"), (FULL_NORM, "full")]


def parallel(tensor: int, expert_tensor: int, sequence: bool) -> ParallelConfig:
    return ParallelConfig(
        tensor_parallel_size=tensor, expert_tensor_parallel_size=expert_tensor, sequence_parallel=sequence
    )


@pytest.mark.parametrize(("table", "qk_norm"), FAMILIES, ids=["paper", "head norm", "full norm"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("expert_tensor", [1, 2])
def test_every_parameter_under_every_folding(table, qk_norm, expert_tensor, sequence):
    layout = parallel(2, expert_tensor, sequence)
    for parameter in table:
        how = lies(parameter.name, qk_norm)
        summed = how == "part" or (how == "slice" and sequence) or (how == "expert whole" and expert_tensor == 2)
        whole = how in ("part", "slice") or (how == "expert whole" and expert_tensor == 2)
        assert is_summed_over_tensor(parameter, layout) == summed, parameter.name
        assert is_whole_on_each_tensor_rank(parameter, layout) == whole, parameter.name


def test_all_ways_to_lie_are_seen():
    seen = {lies(parameter.name, qk_norm) for table, qk_norm in FAMILIES for parameter in table}
    assert seen == {"cut", "slice", "part", "expert cut", "expert whole"}


@pytest.mark.parametrize(("table", "qk_norm"), FAMILIES, ids=["paper", "head norm", "full norm"])
def test_one_tensor_rank_sums_nothing(table, qk_norm):
    assert not any(is_summed_over_tensor(parameter, parallel(1, 1, False)) for parameter in table)
