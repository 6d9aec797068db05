"""Settings of experts, routers and all-to-all that do not go together: what the user reads, by exact text."""

import pytest

from megamoe.config.exchange import check_nodes
from megamoe.config.schema import ParallelConfig
from megamoe.errors import ConfigError, TopologyError
from megamoe.topology.grid import Grid
from megamoe.topology.nodes import exchange_levels
from tests.unit.config_cases import DENSE, checked, refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.num_experts=60", "parallel.expert_parallel_size=8"],
            "expert_parallel_size 8 does not divide num_experts 60: use 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60",
        ),
        (
            [*DENSE, "model.seq_length=127", "parallel.sequence_parallel=true"],
            "tensor_parallel_size 2 does not divide seq_length 127: use 1",
        ),
        (
            ["parallel.expert_tensor_parallel_size=4"],
            "expert_tensor_parallel_size 4 is neither 1 nor tensor_parallel_size 2: use 1 or 2",
        ),
        (
            ["parallel.expert_tensor_parallel_size=2", "moe.expert_ffn_hidden_size=7"],
            "expert_tensor_parallel_size 2 does not divide expert_ffn_hidden_size 7: use 1",
        ),
        (
            ["moe.num_experts=0"],
            "expert_parallel_size 2 needs experts, but num_experts is 0: use expert_parallel_size 1",
        ),
        (["moe.top_k=9"], "top_k 9 is more than num_experts 8: use 1 to 8"),
        (
            ["moe.layer_pattern=5"],
            "layer_pattern 5 puts experts in none of the 4 layers: use 1 to 4, or a list of layers",
        ),
        (
            ["moe.layer_pattern=[]"],
            "layer_pattern [] puts experts in no layer: list at least one, or set num_experts 0",
        ),
        (["moe.layer_pattern=[1,4]"], "layer_pattern names layer 4, but num_layers is 4: use layers 0 to 3"),
        (["moe.layer_pattern=[-1]"], "layer_pattern names layer -1, but num_layers is 4: use layers 0 to 3"),
        (
            ["moe.top_k=1"],
            "top_k 1 with normalize_gates true makes every gate 1, so that the router never learns from the language "
            "loss: use normalize_gates false",
        ),
        (
            ["moe.eval_capacity_factor=2", "moe.eval_capacity_fraction=0.5"],
            "eval_capacity_factor and eval_capacity_fraction are both set: use one of them",
        ),
        (["moe.layer_pattern=[1,1]"], "layer_pattern names layer 1 twice: list each layer once"),
        (
            ["moe.score_function=sigmoid", "moe.gate_order=select_then_softmax"],
            "gate_order select_then_softmax means nothing to score_function sigmoid: use gate_order "
            "softmax_then_select, or score_function softmax",
        ),
        (
            ["moe.top_k=1", "moe.normalize_gates=false", "moe.gate_order=select_then_softmax"],
            "top_k 1 with gate_order select_then_softmax makes every gate 1, so that the router never learns from the "
            "language loss: use gate_order softmax_then_select",
        ),
        (
            ["moe.balance_bias_update_rate=0.001"],
            "balance_bias_update_rate 0.001 needs score_function sigmoid, but it is softmax: use score_function "
            "sigmoid, or balance_bias_update_rate 0",
        ),
        (
            ["moe.normalize_gates=false", "moe.normalize_when=before_drops"],
            "normalize_when before_drops means nothing with normalize_gates false: use normalize_gates true, or "
            "normalize_when after_drops",
        ),
        (
            ["moe.num_expert_groups=4"],
            "num_expert_groups 4 needs num_selected_groups, which is not set: set both or neither",
        ),
        (
            ["moe.num_selected_groups=4"],
            "num_selected_groups 4 needs num_expert_groups, which is not set: set both or neither",
        ),
        (
            ["moe.num_expert_groups=3", "moe.num_selected_groups=1"],
            "num_expert_groups 3 does not divide num_experts 8: use 1, 2, 4, 8",
        ),
        (
            ["moe.num_expert_groups=4", "moe.num_selected_groups=5"],
            "num_selected_groups 5 is more than num_expert_groups 4: use 1 to 4",
        ),
        (
            ["moe.num_expert_groups=4", "moe.num_selected_groups=1", "moe.top_k=3"],
            "num_selected_groups 1 of 2 experts each hold fewer than top_k 3 experts: use num_selected_groups 2 to 4",
        ),
        (
            ["moe.dropless=true", "moe.normalize_when=before_drops"],
            "normalize_when before_drops means nothing with dropless true: use normalize_when after_drops, or "
            "dropless false",
        ),
        (
            ["moe.dropless=true", "moe.drop_policy=probability"],
            "drop_policy probability means nothing with dropless true: use drop_policy position, or dropless false",
        ),
        (
            ["moe.shared_expert_mix=residual"],
            "shared_expert_mix residual needs shared_expert_ffn_hidden_size, which is not set: set it, or use "
            "shared_expert_mix add",
        ),
        (
            ["moe.shared_expert_ffn_hidden_size=33"],
            "tensor_parallel_size 2 does not divide shared_expert_ffn_hidden_size 33: use 1",
        ),
        (
            [*DENSE, "moe.shared_expert_ffn_hidden_size=32"],
            "shared_expert_ffn_hidden_size 32 needs experts to stand beside, but num_experts is 0: use "
            "shared_expert_ffn_hidden_size null",
        ),
        (
            [*DENSE, "moe.num_experts_by_layer=[4,8]"],
            "num_experts_by_layer needs num_experts 8, the largest of its entries, but num_experts is 0: set it, or "
            "use num_experts_by_layer null",
        ),
        (
            ["moe.num_experts_by_layer=[4,4,8]"],
            "num_experts_by_layer has 3 entries, but layer_pattern puts experts in 2 layers: list 2",
        ),
        (
            ["moe.num_experts_by_layer=[]"],
            "num_experts_by_layer has 0 entries, but layer_pattern puts experts in 2 layers: list 2",
        ),
        (
            ["moe.num_experts_by_layer=[8]", "moe.layer_pattern=[0,3]"],
            "num_experts_by_layer has 1 entries, but layer_pattern puts experts in 2 layers: list 2",
        ),
        (
            ["moe.num_experts_by_layer=[2,4]"],
            "num_experts 8 is not the largest of num_experts_by_layer [2, 4]: use num_experts 4",
        ),
        (
            ["moe.num_experts_by_layer=[4,16]"],
            "num_experts 8 is not the largest of num_experts_by_layer [4, 16]: use num_experts 16",
        ),
        (
            ["moe.num_experts_by_layer=[6,8]", "parallel.expert_parallel_size=4"],
            "expert_parallel_size 4 does not divide num_experts_by_layer[0] 6: use 1, 2",
        ),
        (
            ["moe.num_experts_by_layer=[8,2]", "moe.top_k=4"],
            "top_k 4 is more than num_experts_by_layer[1] 2: use 1 to 2",
        ),
        (
            ["moe.num_experts_by_layer=[8,6]", "moe.num_expert_groups=4", "moe.num_selected_groups=2"],
            "num_expert_groups 4 does not divide num_experts_by_layer[1] 6: use 1, 2",
        ),
        (
            ["moe.num_experts_by_layer=[8,4]", "moe.num_expert_groups=4", "moe.num_selected_groups=1"],
            "num_selected_groups 1 of 1 experts each hold fewer than top_k 2 experts: use num_selected_groups 2 to 4",
        ),
        (
            ["parallel.all_to_all_chunks=3", "moe.num_experts=8", "parallel.expert_parallel_size=2"],
            "all_to_all_chunks 3 does not divide the experts of a rank, num_experts 8 / expert_parallel_size 2 = 4: "
            "use 1, 2, 4",
        ),
        (
            [
                "parallel.all_to_all_chunks=4", "moe.num_experts=8", "parallel.expert_parallel_size=2",
                "moe.num_experts_by_layer=[4,8]", "model.num_layers=4",
            ],
            "all_to_all_chunks 4 does not divide the experts of a rank, num_experts_by_layer[0] 4 / "
            "expert_parallel_size 2 = 2: use 1, 2",
        ),
        (
            [*DENSE, "parallel.all_to_all_chunks=2"],
            "all_to_all_chunks 2 needs experts, but num_experts is 0: use all_to_all_chunks 1",
        ),
        (
            [*DENSE, "parallel.all_to_all=hierarchical"],
            "all_to_all hierarchical needs experts, but num_experts is 0: use all_to_all flat",
        ),
    ],
)
def test_an_impossible_mixture_says_what_would_be_valid(overrides, message):
    assert refused(checked, *overrides) == message


@pytest.mark.parametrize("ranks_per_node", range(1, 13))
@pytest.mark.parametrize(("expert", "tensor"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2), (6, 2)])
def test_nodes_that_pass_are_those_the_groups_can_be_made_for(expert, tensor, ranks_per_node):
    sizes = {"expert_parallel_size": expert, "tensor_parallel_size": tensor, "expert_tensor_parallel_size": tensor}
    parallel = ParallelConfig(all_to_all="hierarchical", ranks_per_node=ranks_per_node, **sizes)
    outcomes = []
    for check, error in [
        (lambda: check_nodes(parallel, 12), ConfigError),
        (lambda: exchange_levels(Grid.from_config(parallel, 12).expert_groups(), ranks_per_node), TopologyError),
    ]:
        try:
            check()
            outcomes.append("fits")
        except error:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]
