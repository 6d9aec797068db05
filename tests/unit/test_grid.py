"""The rank grid against its own laws, and against the rank lists of Megatron-core and DeepSpeed. No processes."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.config.schema import ParallelConfig
from megamoe.errors import ConfigError, TopologyError
from megamoe.topology.grid import Grid, describe, groups_mismatch

FAMILIES = {
    "tensor_groups": lambda grid: grid.tensor,
    "data_groups": lambda grid: grid.data,
    "pipeline_groups": lambda grid: grid.pipeline,
    "model_groups": lambda grid: grid.tensor * grid.pipeline,
    "expert_groups": lambda grid: grid.expert,
    "expert_data_groups": lambda grid: grid.expert_data,
    "expert_tensor_groups": lambda grid: grid.expert_tensor,
}
# The coordinates that a group's members share; in all others they differ.
FIXED = {
    "tensor_groups": ("data", "pipeline"),
    "data_groups": ("tensor", "pipeline"),
    "pipeline_groups": ("tensor", "data", "expert", "expert_data", "expert_tensor"),
    "model_groups": ("data",),
    "expert_groups": ("expert_data", "expert_tensor", "pipeline"),
    "expert_data_groups": ("expert", "expert_tensor", "pipeline"),
    "expert_tensor_groups": ("expert", "expert_data", "pipeline"),
}


@st.composite
def grids(draw, largest: int = 4) -> Grid:
    """Any valid grid: expert tensor 1 or tensor; expert any divisor of what is left of a stage."""
    tensor, pipeline, data = (draw(st.integers(1, largest)) for _ in range(3))
    expert_tensor = draw(st.sampled_from(sorted({1, tensor})))
    left = tensor * data // expert_tensor
    expert = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
    return Grid(tensor, pipeline, expert, expert_tensor, tensor * data * pipeline)


def all_grids() -> list[Grid]:
    """Every valid grid with sizes up to 4 (data up to 6): hundreds."""
    found = []
    for tensor in (1, 2, 3, 4):
        for pipeline in (1, 2, 4):
            for data in (1, 2, 3, 4, 6):
                for expert_tensor in sorted({1, tensor}):
                    left = tensor * data // expert_tensor
                    for expert in (n for n in range(1, left + 1) if left % n == 0):
                        found.append(Grid(tensor, pipeline, expert, expert_tensor, tensor * data * pipeline))
    return found


GRIDS = all_grids()


@settings(deadline=None)
@given(grids())
def test_every_family_partitions_the_ranks_into_groups_of_its_size(grid):
    for family, size in FAMILIES.items():
        groups = getattr(grid, family)()
        assert Counter(rank for group in groups for rank in group) == Counter(range(grid.world)), family
        assert {len(group) for group in groups} == {size(grid)}, family
        assert all(group == sorted(group) for group in groups), family


@settings(deadline=None)
@given(grids())
def test_members_of_a_group_share_the_coordinates_they_should(grid):
    for family, names in FIXED.items():
        seen = set()
        for group in getattr(grid, family)():
            fixed = {tuple(getattr(grid.coordinates(rank), name) for name in names) for rank in group}
            assert len(fixed) == 1, family
            seen |= fixed
        # Two groups of one family never share them all, so the groups cannot be smaller than they should be.
        assert len(seen) == len(getattr(grid, family)()), family


@settings(deadline=None)
@given(grids())
def test_coordinates_and_rank_at_are_inverse(grid):
    for rank in range(grid.world):
        c = grid.coordinates(rank)
        assert c.rank == rank
        assert grid.rank_at(tensor=c.tensor, data=c.data, pipeline=c.pipeline) == rank
        expert = {"expert": c.expert, "expert_data": c.expert_data, "expert_tensor": c.expert_tensor}
        assert grid.rank_at_expert(**expert, pipeline=c.pipeline) == rank


@settings(deadline=None)
@given(grids())
def test_both_foldings_cover_the_same_stage_block(grid):
    assert grid.expert * grid.expert_tensor * grid.expert_data == grid.tensor * grid.data == grid.stage_ranks
    for stage in range(grid.pipeline):
        block = set(range(stage * grid.stage_ranks, (stage + 1) * grid.stage_ranks))
        dense = {grid.rank_at(tensor=t, data=d, pipeline=stage) for t in range(grid.tensor) for d in range(grid.data)}
        experts = {
            grid.rank_at_expert(expert=e, expert_data=d, expert_tensor=t, pipeline=stage)
            for e in range(grid.expert)
            for d in range(grid.expert_data)
            for t in range(grid.expert_tensor)
        }
        assert dense == experts == block


@settings(deadline=None)
@given(grids())
def test_embedding_groups_are_the_ends_of_the_pipelines(grid):
    ends = [sorted({group[0], group[-1]}) for group in grid.pipeline_groups()]
    assert grid.embedding_groups() == ends
    for group in ends:
        assert {grid.coordinates(rank).pipeline for rank in group} == {0, grid.pipeline - 1}


def test_expert_groups_span_tensor_peers_first_unless_experts_are_cut():
    assert Grid(tensor=2, pipeline=1, expert=4, expert_tensor=1, world=8).expert_groups() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert Grid(tensor=2, pipeline=1, expert=4, expert_tensor=2, world=8).expert_groups() == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]


def test_groups_equal_megatron_core():
    from megatron.core import parallel_state

    order = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel
    for grid in GRIDS:
        pp = grid.pipeline
        dense = parallel_state.RankGenerator(tp=grid.tensor, ep=1, dp=grid.data, pp=pp, cp=1, order=order)
        experts = parallel_state.RankGenerator(
            tp=grid.expert_tensor, ep=grid.expert, dp=grid.expert_data, pp=pp, cp=1, order=order
        )
        assert grid.tensor_groups() == dense.get_ranks("tp"), grid
        assert grid.data_groups() == dense.get_ranks("dp"), grid
        assert grid.pipeline_groups() == dense.get_ranks("pp") == experts.get_ranks("pp"), grid
        assert grid.model_groups() == dense.get_ranks("tp-pp"), grid
        assert grid.expert_groups() == experts.get_ranks("ep"), grid
        assert grid.expert_data_groups() == experts.get_ranks("dp"), grid
        assert grid.expert_tensor_groups() == experts.get_ranks("tp"), grid
        assert grid.embedding_groups() == [parallel_state.default_embedding_ranks(p) for p in dense.get_ranks("pp")], (
            grid
        )
    assert len(GRIDS) > 200


def test_expert_groups_equal_deepspeed_where_experts_are_cut_by_tensor():
    from deepspeed.utils import groups

    compared = [grid for grid in GRIDS if grid.expert_tensor == grid.tensor]
    for grid in compared:
        expert, expert_data = groups._get_expert_parallel_ranks(grid.world, grid.tensor, grid.expert, grid.pipeline)
        assert groups_mismatch("expert", grid.expert_groups(), expert) is None, grid
        assert groups_mismatch("expert_data", grid.expert_data_groups(), expert_data) is None, grid
    assert len({grid.tensor for grid in compared}) == 4


def test_expert_groups_equal_deepspeed_where_experts_are_whole(monkeypatch):
    """deepspeed.moe.layer.MoE builds these with process groups at once: record the ranks it asks for."""
    from deepspeed.utils import groups

    monkeypatch.setattr(groups, "log_dist", lambda *args, **kwargs: None)
    compared = [grid for grid in GRIDS if grid.expert_tensor == 1]
    for grid in compared:
        created = []
        recorder = SimpleNamespace(
            is_initialized=lambda: True,
            get_rank=lambda: 0,
            get_world_size=lambda world=grid.world: world,
            new_group=lambda ranks, created=created: created.append(list(ranks)),
        )
        monkeypatch.setattr(groups, "dist", recorder)
        for family in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
            monkeypatch.setattr(groups, family, {})
            monkeypatch.setattr(groups, f"{family}_RANKS", {})
        groups._create_expert_and_data_parallel(grid.expert, pp_size=grid.pipeline)
        num_expert_data = len(grid.expert_data_groups())  # DeepSpeed creates these first
        assert groups_mismatch("expert_data", grid.expert_data_groups(), created[:num_expert_data]) is None, grid
        assert groups_mismatch("expert", grid.expert_groups(), created[num_expert_data:]) is None, grid
    assert len({grid.tensor for grid in compared}) == 4


def test_mismatch_names_both_lists_and_minds_the_order_of_members_only():
    assert groups_mismatch("expert", [[0, 1], [2, 3]], [(2, 3), range(2)]) is None
    assert groups_mismatch("expert", [[0, 1], [2, 3]], [[0, 2], [1, 3]]) == (
        "the expert groups of the engine are not those of the rank grid: "
        "the grid has [[0, 1], [2, 3]], the engine [[0, 2], [1, 3]]"
    )
    assert groups_mismatch("data", [[0, 1]], [[1, 0]]) is not None
    assert groups_mismatch("data", [[0], [1]], [[0]]) is not None
    assert groups_mismatch("data", [[0]], [[0], [0]]) is not None


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (
            {"tensor": 2, "pipeline": 2, "expert": 1, "expert_tensor": 1, "world": 6},
            TopologyError,
            (
                "6 ranks cannot be split over parallel.tensor_parallel_size 2 x parallel.pipeline_parallel_size 2: "
                "start a multiple of 4 ranks"
            ),
        ),
        (
            {"tensor": 2, "pipeline": 2, "expert": 3, "expert_tensor": 1, "world": 8},
            TopologyError,
            (
                "parallel.expert_parallel_size 3 x parallel.expert_tensor_parallel_size 1 does not divide the 4 ranks "
                "of a pipeline stage: use an expert_parallel_size of 1, 2, 4"
            ),
        ),
        (
            {"tensor": 4, "pipeline": 1, "expert": 1, "expert_tensor": 2, "world": 4},
            ConfigError,
            "parallel.expert_tensor_parallel_size 2 is neither 1 nor parallel.tensor_parallel_size: use 1 or 4",
        ),
        (
            {"tensor": 0, "pipeline": 1, "expert": 1, "expert_tensor": 1, "world": 4},
            ConfigError,
            "the tensor size of the rank grid is 0: use 1 or more",
        ),
    ],
)
def test_impossible_grids_say_what_would_be_valid(sizes, error, message):
    with pytest.raises(error) as raised:
        Grid(**sizes)
    assert str(raised.value) == message


def test_coordinates_outside_the_grid_are_refused():
    grid = Grid(tensor=2, pipeline=1, expert=1, expert_tensor=1, world=4)
    with pytest.raises(TopologyError, match="rank 4 is not one of the 4 ranks 0 to 3"):
        grid.coordinates(4)
    with pytest.raises(TopologyError, match="tensor coordinate 2 lies outside the grid: use 0 to 1"):
        grid.rank_at(tensor=2)
    with pytest.raises(TopologyError, match="expert coordinate -1 lies outside the grid: use 0 to 0"):
        grid.rank_at_expert(expert=-1)


def test_from_config_reads_every_size():
    parallel = ParallelConfig(
        tensor_parallel_size=2, pipeline_parallel_size=3, expert_parallel_size=5, expert_tensor_parallel_size=2
    )
    grid = Grid.from_config(parallel, world_size=60)
    assert (grid.tensor, grid.pipeline, grid.expert, grid.expert_tensor, grid.world) == (2, 3, 5, 2, 60)
    assert (grid.data, grid.expert_data) == (10, 2)


def test_the_documented_drawing_is_what_describe_draws():
    page = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
    assert describe(Grid(tensor=2, pipeline=2, expert=2, expert_tensor=1, world=8)) in page


def test_a_drawing_of_thousands_of_ranks_stays_short():
    drawing = describe(Grid(tensor=8, pipeline=16, expert=64, expert_tensor=1, world=8192)).splitlines()
    assert len(drawing) <= 16
    assert max(map(len, drawing)) <= 120
