"""What each rank holds of the parameter table: slices that tile every tensor, and layers dealt out to stages."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.config.schema import ModelConfig, MoEConfig
from megamoe.errors import TopologyError
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import local_shape, local_slices, param_table
from megamoe.topology.stages import chunk_parameters, stage_layers, stage_of_layer
from tests.unit.parameter_cases import MODERN, TINY


@st.composite
def models_on_grids(draw):
    """A tiny model whose cut dimensions are multiples of 2 and 4, on any grid of those sizes."""
    tensor, pipeline, data = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((1, 2))), draw(st.integers(1, 4))
    expert_tensor = draw(st.sampled_from(sorted({1, tensor})))
    left = tensor * data // expert_tensor
    expert = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
    grid = Grid(tensor, pipeline, expert, expert_tensor, tensor * data * pipeline)
    virtual = draw(st.sampled_from((1, 2)))
    model = ModelConfig(
        num_layers=4,
        hidden_size=8,
        num_attention_heads=4,
        vocab_size=24,
        vocab_size_multiple=8,
        activation=draw(st.sampled_from(("gelu", "swiglu"))),
        qk_norm=draw(st.sampled_from(("none", "head", "full"))),
        tie_embeddings=draw(st.booleans()),
        use_bias=draw(st.booleans()),
    )
    moe = MoEConfig(num_experts=expert * draw(st.sampled_from((1, 2))), layer_pattern=draw(st.sampled_from((1, 2))))
    return grid, virtual, param_table(model, moe)


@settings(deadline=None, max_examples=60)
@given(models_on_grids())
def test_slices_of_all_ranks_tile_every_parameter(case):
    """Each element lies on as many ranks as hold copies of it: no more, no fewer, and equally many everywhere."""
    grid, virtual, table = case
    tied = all(parameter.kind != "output" for parameter in table)
    covered = {parameter.name: np.zeros(parameter.shape, dtype=np.int64) for parameter in table}
    for rank in range(grid.world):
        at = grid.coordinates(rank)
        held = set()  # a tied embedding is one tensor where one rank holds both the first and the last chunk
        for chunk in range(virtual):
            held |= set(
                chunk_parameters(
                    table,
                    num_layers=4,
                    pipeline=grid.pipeline,
                    virtual=virtual,
                    pipeline_rank=at.pipeline,
                    chunk=chunk,
                )
            )
        for parameter in held:
            part = covered[parameter.name][local_slices(parameter, grid, at)]
            assert part.shape == local_shape(parameter, grid)
            part += 1
    for parameter in table:
        if parameter.kind == "expert":
            copies = grid.expert_data * (grid.expert_tensor if parameter.tensor_dim is None else 1)
        else:
            copies = grid.data * (grid.tensor if parameter.tensor_dim is None else 1)
        if parameter.kind == "embedding" and tied and grid.pipeline > 1:
            copies *= 2
        assert (covered[parameter.name] == copies).all(), parameter.name


def test_swiglu_ranks_take_the_same_columns_of_both_halves():
    grid = Grid(tensor=2, pipeline=1, expert=1, expert_tensor=1, world=2)
    fc1 = next(p for p in param_table(MODERN, MoEConfig()) if p.name == "layers.0.ffn.fc1.weight")
    assert local_slices(fc1, grid, grid.coordinates(1)) == (slice(0, 2), slice(6, 12), slice(0, 8))


def test_cuts_that_do_not_divide_say_what_would():
    grid = Grid(tensor=1, pipeline=1, expert=8, expert_tensor=1, world=8)
    table = param_table(TINY, MoEConfig(num_experts=60))
    experts = next(parameter for parameter in table if parameter.name == "layers.1.experts.fc1.weight")
    with pytest.raises(TopologyError) as raised:
        local_shape(experts, grid)
    assert str(raised.value) == (
        "dimension 0 of layers.1.experts.fc1.weight has size 60, which parallel.expert_parallel_size 8 "
        "does not divide: use one of 1, 2, 3, 4, 5, 6, 10, 12, 15"
    )


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_stages_deal_out_every_layer_once(pipeline, virtual, count):
    num_layers = pipeline * virtual * count
    dealt = {}
    for chunk in range(virtual):
        for rank in range(pipeline):
            for layer in stage_layers(num_layers, pipeline, virtual, rank, chunk):
                assert dealt.setdefault(layer, (rank, chunk)) == (rank, chunk)
    assert sorted(dealt) == list(range(num_layers))
    assert all(stage_of_layer(layer, num_layers, pipeline, virtual) == place for layer, place in dealt.items())


def test_interleaved_stages_and_their_errors():
    assert [stage_layers(8, 2, 2, rank, chunk) for rank in (0, 1) for chunk in (0, 1)] == [
        range(2),
        range(4, 6),
        range(2, 4),
        range(6, 8),
    ]
    with pytest.raises(TopologyError) as raised:
        stage_layers(6, 2, 2, 0, 0)
    assert str(raised.value) == (
        "model.num_layers 6 cannot be split over parallel.pipeline_parallel_size 2 x "
        "parallel.virtual_pipeline_parallel_size 2: use a multiple of 4 layers"
    )
    with pytest.raises(TopologyError, match="there is no chunk 2 on pipeline rank 0"):
        stage_layers(8, 2, 2, 0, 2)
    with pytest.raises(TopologyError, match="layer 8 does not exist: layers go from 0 to 7"):
        stage_of_layer(8, 8, 2, 2)
