"""Groups that an engine made otherwise than the grid stop the run before anything is built, with both lists."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from megamoe.errors import TopologyError
from megamoe.topology.grid import Grid
from megamoe.training.groups import _check_megatron, create_groups, destroy_groups
from tests.harness import run_ranks
from tests.parallel.worlds import config, parallel, world

SETTINGS = config("paper", parallel(tp=2, ep=2, zero=1))


SWAPPED = [[0, 3], [1, 2]]


def on_rank() -> dict[str, str]:
    """The sentence of each fault, on this rank."""
    found = {}
    with world(SETTINGS):
        made = create_groups(SETTINGS.parallel)
        for family in ("tensor", "data", "pipeline", "model", "expert", "expert_data", "expert_tensor"):
            found[family] = with_other_grid(family, lambda: _check_megatron(made))
        destroy_groups()
        found["at start"] = with_other_grid("expert", start)
        original = deepspeed_groups._get_data_parallel_group
        deepspeed_groups._get_data_parallel_group = lambda: dist.group.WORLD
        found["DeepSpeed data"] = sentence(start)
        deepspeed_groups._get_data_parallel_group = original
        # As a library leaves it that let DeepSpeed make groups of the same size before us.
        deepspeed_groups._EXPERT_PARALLEL_GROUP["ep_size_2"] = dist.group.WORLD
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS["ep_size_2"] = [0, 1, 2, 3]
        found["DeepSpeed expert"] = sentence(start)
        found["none"] = sentence(start)
        dist.barrier()
    return found


def with_other_grid(family: str, action: Callable[[], object]) -> str:
    """As if Megatron-core had other groups of this family than the grid."""
    method = f"{family}_groups"
    original = getattr(Grid, method)
    setattr(Grid, method, lambda self: SWAPPED)
    try:
        return sentence(action)
    finally:
        setattr(Grid, method, original)


def start() -> None:
    try:
        create_groups(SETTINGS.parallel)
    finally:
        destroy_groups()


def sentence(action: Callable[[], object]) -> str:
    try:
        action()
    except TopologyError as error:
        return str(error)
    return ""


def test_other_groups_of_an_engine_stop_the_run_with_both_lists():
    ranks = run_ranks(on_rank, 4, init=False)
    text = "the {} groups of the engine are not those of the rank grid: the grid has {}, the engine {}".format
    engine_has = {
        "tensor": ([0, 1], [2, 3]), "data": ([0, 2], [1, 3]), "pipeline": ([0], [1], [2], [3]),
        "model": ([0, 1], [2, 3]), "expert": ([0, 1], [2, 3]), "expert_data": ([0, 2], [1, 3]),
        "expert_tensor": ([0], [1], [2], [3]),
    }  # fmt: skip

    def of(groups: Sequence[list[int]], rank: int) -> list[list[int]]:
        return [group for group in groups if rank in group]

    for rank, found in enumerate(ranks):
        for family, groups in engine_has.items():
            name = f"Megatron-core {family.replace('_', '-')}"
            assert found[family] == text(name, of(SWAPPED, rank), of(groups, rank))
        assert found["at start"] == found["expert"]
        mine = partial(of, rank=rank)
        assert found["DeepSpeed data"] == text("DeepSpeed data", mine(engine_has["data"]), [[0, 1, 2, 3]])
        assert found["DeepSpeed expert"] == text("DeepSpeed expert", mine(engine_has["expert"]), [[0, 1, 2, 3]])
        assert found["none"] == ""  # and the groups as they are do not stop it
