"""FLOPs against published counts and formulas and against what torch counts; when products are bound by memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.plan.cluster import load_cluster
from megamoe.plan.compute import Compute, Product, pass_seconds, product_seconds
from megamoe.plan.quantities import Load
from megamoe.topology.flops import hardware_flops_per_token, layer_forward_flops_per_token, model_flops_per_token
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import num_active_parameters, param_table

A100 = load_cluster("a100-80gb")
BF16 = load_config("mixtral-8x7b")


def test_the_1_1t_model_takes_the_published_flops():
    """54.6 GF for a token of a 1,024 context; with full recompute of the layers a third more of those."""
    config = load_config("moe-1.1t", ["model.seq_length=1024"])
    assert model_flops_per_token(config) == pytest.approx(54.6e9, rel=1e-3)
    assert config.parallel.recompute == "full"
    assert hardware_flops_per_token(config) == pytest.approx(72.8e9, rel=0.01)
    logits = 2 * 4096 * 51_200  # OPT's and the table's figure computes the logits again as well
    assert hardware_flops_per_token(config) + logits == pytest.approx(72.8e9, rel=1e-3)


@pytest.mark.parametrize("name", ["dense-125m", "dense-1.3b", "dense-6.7b", "dense-13b"])
def test_dense_models_take_the_flops_of_megatrons_formula(name):
    """Narayanan et al. 2021, eq. 3: 96 B s l h^2 (1 + s / 6h + V / 16 l h) with full recompute, 72 and 12 without."""
    config = load_config(name)
    model = config.model
    s, n, h, v = model.seq_length, model.num_layers, model.hidden_size, model.vocab_size
    assert model_flops_per_token(config) == pytest.approx(72 * n * h**2 * (1 + s / (6 * h) + v / (12 * n * h)))
    assert hardware_flops_per_token(config) == pytest.approx(96 * n * h**2 * (1 + s / (6 * h) + v / (16 * n * h)))


@pytest.mark.parametrize("name", ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "moe-52b"])
def test_models_take_six_flops_for_an_active_parameter_and_attention(name):
    config = load_config(name)
    table = param_table(config.model, config.moe)
    matrices = num_active_parameters([p for p in table if not p.is_bias_or_norm and p.kind != "embedding"], config.moe)
    if config.model.tie_embeddings:
        matrices += next(p.num_elements for p in table if p.kind == "embedding")
    heads = config.model.num_attention_heads * (config.model.head_dim or config.model.hidden_size // 16)
    if config.model.head_dim is None:
        heads = config.model.hidden_size
    scores = 12 * config.model.seq_length * heads * config.model.num_layers
    assert model_flops_per_token(config) == pytest.approx(6 * matrices + scores)
    assert model_flops_per_token(config, attention="causal") == pytest.approx(6 * matrices + scores / 2)


SMALL = Config.model_validate(
    {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 16,
                  "vocab_size": 256, "activation": "swiglu", "ffn_hidden_size": 48, "use_bias": False},
        "moe": {"num_experts": 8, "top_k": 2, "layer_pattern": 2, "dropless": True},
        "run": {"micro_batch_size": 2},
    }
)  # fmt: skip


def test_a_layer_takes_the_flops_that_torch_counts():
    """The matrix products of a dense and of an MoE layer, written as torch calls of the shapes that they have."""
    tokens, hidden, ffn = 32, 32, 48
    x, wide = torch.zeros(tokens, hidden), torch.zeros(tokens, ffn)
    q, k = torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 8, 16)
    with FlopCounterMode(display=False) as dense:
        x @ torch.zeros(hidden, 32 + 2 * 16)
        torch.matmul(q, k)
        torch.matmul(torch.zeros(2, 4, 16, 16), q)
        x @ torch.zeros(hidden, hidden)
        x @ torch.zeros(hidden, 2 * ffn)
        wide @ torch.zeros(ffn, hidden)
    grid = Grid(1, 1, 1, 1, 1)
    compute = Compute(SMALL, grid, Load(), fused_attention=False)
    assert compute.layer(0).flops == dense.get_total_flops()
    with FlopCounterMode(display=False) as experts:
        x @ torch.zeros(hidden, 8)
        torch.bmm(torch.zeros(8, 8, hidden), torch.zeros(8, hidden, 2 * ffn))
        torch.bmm(torch.zeros(8, 8, ffn), torch.zeros(8, ffn, hidden))
    ffn_flops = 2 * tokens * hidden * 3 * ffn
    assert compute.layer(8).flops - compute.layer(0).flops == experts.get_total_flops() - ffn_flops


@pytest.mark.parametrize(
    ("tensor", "expert", "expert_tensor", "world"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 2, 8), (4, 8, 1, 8), (2, 4, 1, 8)],
)
def test_what_ranks_compute_adds_up_to_what_the_model_does(tensor, expert, expert_tensor, world):
    """Balanced and dropless: nothing is computed twice in any layout, but a router on every slice."""
    grid = Grid(tensor, 1, expert, expert_tensor, world)
    compute = Compute(SMALL, grid, Load(), fused_attention=False)
    per_rank = compute.layer(0).flops + compute.layer(8).flops
    tokens = compute.tokens * grid.data
    router = 2 * 32 * 8 * (tensor - 1) if expert_tensor > 1 else 0  # each tensor rank routes all tokens
    expected = layer_forward_flops_per_token(SMALL) + router
    assert per_rank * world == pytest.approx(tokens * expected)


def test_load_and_capacity_change_the_rows_of_experts_alone():
    grid = Grid(1, 1, 1, 1, 1)
    base = Compute(SMALL, grid, Load())
    skewed = Compute(SMALL, grid, Load(max_over_mean=1.5))
    assert skewed.rows(8).received == 1.5 * base.rows(8).received == 1.5 * 64
    assert skewed.layer(0) == base.layer(0)
    dropping = SMALL.model_copy(
        update={"moe": SMALL.moe.model_copy(update={"dropless": False, "capacity_factor": 0.5})}
    )
    assert Compute(dropping, grid, Load()).rows(8).received == 32
    assert Compute(dropping, grid, Load(1.5)).rows(8).received == 32, "capacity is full already"
    roomy = dropping.model_copy(update={"moe": dropping.moe.model_copy(update={"capacity_factor": 1.25})})
    assert [Compute(roomy, grid, Load(skew)).rows(8).received for skew in (1.0, 1.1, 1.5)] == [64, 70, 80]


def test_experts_with_few_rows_cost_what_reading_their_weights_costs():
    """A property of the shapes: below some hundred rows time stands still, above it grows with the rows."""
    seconds = {rows: product_seconds(Product(rows, 16_384, 4096, batch=16), A100, BF16) for rows in (1, 16, 4096, 8192)}
    weights = 16 * 16_384 * 4096 * 2
    reading = weights / (A100.memory_bytes_per_second * A100.efficiency.memory)
    assert seconds[1] == pytest.approx(reading, rel=0.01)
    assert seconds[16] == pytest.approx(reading, rel=0.05)
    assert seconds[8192] / seconds[4096] == pytest.approx(2, rel=0.05)
    # The same rows in one expert: the weights of one are read instead of 16.
    assert product_seconds(Product(16, 16_384, 4096), A100, BF16) < seconds[1] / 10


def test_small_sizes_reach_half_the_rate_at_the_size_that_the_constant_names():
    unbound = A100.model_copy(update={"memory_bytes_per_second": 1e30})
    half = A100.efficiency.product_half_size
    small, large = Product(half, 1e7, 1e7), Product(1e7, 1e7, 1e7)
    ratio = product_seconds(small, unbound, BF16) / small.flops / (product_seconds(large, unbound, BF16) / large.flops)
    assert ratio == pytest.approx(2, rel=1e-3)


def test_the_largest_products_reach_the_measured_share_of_the_peak():
    large = Product(1e6, 1e6, 1e6)
    assert large.flops / product_seconds(large, A100, BF16) == pytest.approx(0.859 * 312e12, rel=1e-3)


def test_one_hot_dispatch_costs_what_is_counted():
    """S = 8,192, E = 512: 2.20 TFLOP forward, half of the experts' 4.40."""
    config = load_config("moe-1.1t", ["run.micro_batch_size=4", "run.global_batch_size=2048"])
    grid = Grid(1, 1, 512, 1, 512)
    plain, one_hot = (Compute(config, grid, Load(), one_hot_dispatch=flag).layer(512) for flag in (False, True))
    assert one_hot.flops - plain.flops == pytest.approx(2.2e12, rel=0.01)
    assert sum(p.flops for p in plain.expert_products) == pytest.approx(4.4e12, rel=0.01)


def test_fused_attention_computes_half_of_the_scores_and_keeps_them_out_of_memory():
    config = load_config("dense-6.7b", ["run.precision=bf16", "run.micro_batch_size=1"])
    alone = Grid(1, 1, 1, 1, 1)
    fused, whole = (Compute(config, alone, Load(), fused_attention=flag).layer(0) for flag in (True, False))
    assert whole.attention_flops == 2 * fused.attention_flops == 4 * 2048 * 2048 * 4096
    assert fused.score_bytes == 0
    assert whole.score_bytes >= 2 * 32 * 2048 * 2048 * 2  # written and read at least
    slower = pass_seconds(whole, A100, config).attention - 2 * pass_seconds(fused, A100, config).attention
    assert slower == pytest.approx(whole.score_bytes / (A100.memory_bytes_per_second * A100.efficiency.memory))


def test_the_backward_pass_takes_twice_the_products():
    config = load_config("dense-6.7b", ["run.precision=bf16"])
    work = Compute(config, Grid(1, 1, 1, 1, 1), Load()).layer(0)
    passes = pass_seconds(work, A100, config)
    assert 2.0 < passes.backward / passes.forward < 2.1
    assert 0 < passes.attention < passes.forward / 2
    assert passes.expert == 0
