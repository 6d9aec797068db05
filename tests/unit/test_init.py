"""Initial weights: the documented draw, cut anyhow; every expert and every tensor its own; the distributions meant."""

import math

import pytest
import torch

from megamoe.config.schema import ModelConfig, MoEConfig, ParallelConfig
from megamoe.model.init import initial_tensor
from megamoe.topology.grid import Grid
from megamoe.topology.initial import Constant, Normal, Uniform, seed_of
from megamoe.topology.parameters import Parameter, local_slices, param_table

MODEL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 256}
MODERN = {
    "normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "tie_embeddings": False,
    "num_query_groups": 2, "qk_norm": "full", "init": "normal",
}  # fmt: skip
MOE = MoEConfig(num_experts=4)
TABLES = {
    "paper": param_table(ModelConfig(**MODEL), MOE),
    "modern": param_table(ModelConfig(**MODEL, **MODERN), MOE),
}
LARGE = param_table(ModelConfig(**(MODEL | {"hidden_size": 128})), MoEConfig(num_experts=2))


def parameter(name: str, shape: tuple[int, ...], init, expert_dim: int | None = None) -> Parameter:
    return Parameter(name, shape, "expert" if expert_dim == 0 else "ffn", 0, None, expert_dim, init, False)


def named(table, name: str) -> Parameter:
    return next(p for p in table if p.name == name)


def test_the_draw_is_the_documented_one():
    uniform, normal = parameter("a", (3, 4), Uniform(0.5)), parameter("b", (3, 4), Normal(2.0))
    generator = torch.Generator().manual_seed(seed_of(7, "a"))
    assert torch.equal(initial_tensor(uniform, 7), torch.empty(3, 4).uniform_(-0.5, 0.5, generator=generator))
    generator = torch.Generator().manual_seed(seed_of(7, "b"))
    assert torch.equal(initial_tensor(normal, 7), torch.empty(3, 4).normal_(0.0, 2.0, generator=generator))
    constant = initial_tensor(parameter("c", (3,), Constant(1.5)), 7)
    assert constant.tolist() == [1.5] * 3 and constant.dtype == torch.float32


def test_each_expert_is_drawn_from_a_seed_of_its_own():
    stacked = initial_tensor(parameter("x", (5, 3, 4), Normal(1.0), expert_dim=0), 7)
    for e in range(5):
        generator = torch.Generator().manual_seed(seed_of(7, f"x/{e}"))
        assert torch.equal(stacked[e], torch.empty(3, 4).normal_(0.0, 1.0, generator=generator))
    assert len({tuple(expert.flatten().tolist()) for expert in stacked}) == 5


@pytest.mark.parametrize("family", TABLES)
def test_no_two_tensors_and_no_two_runs_start_alike(family):
    drawn = [p for p in TABLES[family] if not isinstance(p.init, Constant)]
    starts = {tuple(initial_tensor(p, seed).flatten()[:4].tolist()) for p in drawn for seed in (1, 2)}
    assert len(starts) == 2 * len(drawn)
    for p in drawn:
        assert torch.equal(initial_tensor(p, 1), initial_tensor(p, 1))


def test_the_number_of_experts_does_not_change_an_expert():
    many = param_table(ModelConfig(**MODEL), MoEConfig(num_experts=8))
    name = "layers.1.experts.fc1.weight"
    assert torch.equal(initial_tensor(named(many, name), 1)[:4], initial_tensor(named(TABLES["paper"], name), 1))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    initial_tensor(TABLES["paper"][0], 1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 2, "expert_parallel_size": 2}, 2),
        ({"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2, "expert_parallel_size": 2}, 4),
        ({"expert_parallel_size": 4}, 4),
    ],
)
def test_what_a_rank_draws_is_the_cut_of_the_whole(family, sizes, world_size):
    grid = Grid.from_config(ParallelConfig(**sizes), world_size)
    for p in TABLES[family]:
        whole = initial_tensor(p, 3)
        assert tuple(whole.shape) == p.shape
        pieces = torch.full(p.shape, math.nan)
        for rank in range(world_size):
            slices = local_slices(p, grid, grid.coordinates(rank))
            piece = initial_tensor(p, 3, slices)
            assert torch.equal(piece, whole[slices]), p.name
            assert piece.untyped_storage().nbytes() == piece.numel() * 4, "holds no more than its part"
            pieces[slices] = piece
        assert torch.equal(pieces, whole), p.name


@pytest.mark.parametrize("p", LARGE, ids=lambda p: p.name)
def test_values_are_distributed_as_the_table_says(p):
    values = initial_tensor(p, 5).double()
    if isinstance(p.init, Constant):
        assert values.eq(p.init.value).all()
        return
    deviation = p.init.std if isinstance(p.init, Normal) else p.init.bound / math.sqrt(3)
    five_sigma = 5 / math.sqrt(values.numel())
    assert abs(values.mean().item()) < five_sigma * deviation
    assert values.std().item() == pytest.approx(deviation, rel=five_sigma)
    if isinstance(p.init, Uniform):
        assert values.abs().max() <= p.init.bound
        assert values.max() > p.init.bound * (1 - 20 / values.numel()), "reaches up to the bound"
        assert values.min() < -p.init.bound * (1 - 20 / values.numel())
    elif values.numel() > 10_000:
        assert values.abs().max() > 3.5 * deviation, "a normal has tails"
        assert (values.abs() < deviation).double().mean().item() == pytest.approx(0.6827, abs=five_sigma)
