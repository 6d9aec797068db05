"""Who holds what under a layout: the slices that each rank would write of a given set of tensors."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.slices import PARAMETER_KINDS, Box, Slice, volume
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import Parameter, local_slices, param_table
from megamoe.topology.stages import chunk_parameters

_SMALLEST_SHARE = 4096  # elements: below it one of the copies writes all

Holders = dict[str, dict[Box, list[int]]]  # parameter name -> its parts -> the ranks that hold each, ascending


def layout_of(config: Config, num_ranks: int) -> dict[str, Any]:
    """What decides which rank holds which slices and draws which random numbers, as a manifest's "layout" has it.

    The kind of device is the writer's to add. Raises TopologyError or ConfigError where the sizes do not fit.
    """
    grid = Grid.from_config(config.parallel, num_ranks)
    return {
        "num_ranks": num_ranks,
        "tensor": grid.tensor,
        "pipeline": grid.pipeline,
        "virtual_pipeline": config.parallel.virtual_pipeline_parallel_size,
        "data": grid.data,
        "expert": grid.expert,
        "expert_tensor": grid.expert_tensor,
        "expert_data": grid.expert_data,
        "sequence_parallel": config.parallel.sequence_parallel,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.run.precision,
    }


def holders(config: Config, num_ranks: int) -> Holders:
    """Every part of every parameter and the ranks that hold it. Raises TopologyError where the layout does not fit."""
    grid = Grid.from_config(config.parallel, num_ranks)
    table = param_table(config.model, config.moe)
    found: Holders = defaultdict(lambda: defaultdict(list))
    for stage in range(grid.pipeline):
        held = _parameters_of_stage(table, config, grid, stage)
        for rank in range(stage * grid.stage_ranks, (stage + 1) * grid.stage_ranks):
            coordinates = grid.coordinates(rank)
            for parameter in held:
                cuts = local_slices(parameter, grid, coordinates)
                found[parameter.name][tuple((cut.start, cut.stop) for cut in cuts)].append(rank)
    return found


def slices_by_rank(entries: Iterable[TensorEntry], held: Holders, num_ranks: int) -> list[list[Slice]]:
    """For each rank the slices it writes: the holders of a part share it out evenly, small parts go to one of them.

    What belongs to a layer (balance biases) goes with its router, what belongs to a rank (random states) to that rank.
    Raises CheckpointError for a tensor that the layout has no place for.
    """
    ranks: list[list[Slice]] = [[] for _ in range(num_ranks)]
    for number, entry in enumerate(entries):
        for box, owners in _parts(entry, held, num_ranks).items():
            size = volume(box)
            if size < _SMALLEST_SHARE * len(owners):
                owners = [owners[number % len(owners)]]
            ends = [size * i // len(owners) for i in range(len(owners) + 1)]
            for rank, first, last in zip(owners, ends, ends[1:], strict=False):
                ranks[rank].append(Slice(entry.kind, entry.name, entry.dtype, entry.shape, box, first, last))
    return ranks


def _parts(entry: TensorEntry, held: Holders, num_ranks: int) -> Mapping[Box, list[int]]:
    if entry.kind in PARAMETER_KINDS:
        if entry.name not in held:
            raise CheckpointError(f"{entry.kind} {entry.name} is no parameter of the model in the configuration")
        return held[entry.name]
    router = held.get(f"{entry.name}.weight")
    if entry.kind == "balance_bias" and router:
        owner = min(rank for ranks in router.values() for rank in ranks)
    else:
        digits = entry.name.removeprefix("rank_").partition("/")[0]
        owner = int(digits) % num_ranks if digits.isdecimal() else 0
    return {entry.whole.box: [owner]}


def _parameters_of_stage(table: Iterable[Parameter], config: Config, grid: Grid, stage: int) -> list[Parameter]:
    virtual = config.parallel.virtual_pipeline_parallel_size
    found: dict[str, Parameter] = {}  # a tied embedding may lie in two chunks of one stage
    for chunk in range(virtual):
        for parameter in chunk_parameters(
            table,
            num_layers=config.model.num_layers,
            pipeline=grid.pipeline,
            virtual=virtual,
            pipeline_rank=stage,
            chunk=chunk,
        ):
            found[parameter.name] = parameter
    return list(found.values())


def same_streams(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether random states of one layout mean the same under the other: all but ZeRO stage and precision is equal."""
    keys = (one.keys() | other.keys()) - {"zero_stage", "precision"}
    return all(one.get(key) == other.get(key) for key in keys)
