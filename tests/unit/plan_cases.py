"""What tests of plans need: the collectives of a step, written down from the engines' sources independently."""

from megamoe.config.schema import Config
from megamoe.plan.quantities import Collective
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import dimensions, local_shape, moe_layers, param_table
from megamoe.topology.stages import chunk_parameters, stage_layers

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def plain_collectives(config: Config, world_size: int, pipeline_rank: int) -> tuple[Collective, ...]:
    """The large messages of a step; norms, losses and counts are left out."""
    grid = Grid.from_config(config.parallel, world_size)
    micro_batches = config.run.global_batch_size // (config.run.micro_batch_size * grid.data)
    chunks = config.parallel.virtual_pipeline_parallel_size
    layers = [
        layer
        for chunk in range(chunks)
        for layer in stage_layers(config.model.num_layers, grid.pipeline, chunks, pipeline_rank, chunk)
    ]
    experts = set(moe_layers(config.model, config.moe))
    found = []
    for layer in layers:
        found += _layer(config, grid, layer in experts, micro_batches)
    found += _sends(config, grid, pipeline_rank, micro_batches)
    found += _gradients(config, grid, pipeline_rank)
    return tuple(found)


def _layer(config: Config, grid: Grid, has_experts: bool, count: int) -> list[Collective]:
    sizes, size, sequence = dimensions(config.model, config.moe), SIZE[config.run.precision], config.model.seq_length
    tokens = config.run.micro_batch_size * sequence
    whole = tokens * sizes.hidden * size
    phases = ["forward", *(["recompute"] if config.parallel.recompute == "full" else []), "backward"]
    found = []
    cut = ["attention"] if has_experts else ["attention", "FFN"]
    cut += ["shared expert"] if has_experts and config.moe.shared_expert_ffn_hidden_size else []
    cut += ["experts' output"] if has_experts and grid.expert_tensor > 1 else []
    for phase in phases if grid.tensor > 1 else ():
        for purpose in cut:
            if config.parallel.sequence_parallel:
                # Weights' gradients need the input again; experts' are made of what they were sent.
                gathers = 2 if phase == "backward" and purpose != "experts' output" else 1
                found.append(Collective("all_gather", "tensor", purpose, phase, whole // grid.tensor, count * gathers))
                found.append(Collective("reduce_scatter", "tensor", purpose, phase, whole, count))
            else:
                found.append(Collective("all_reduce", "tensor", purpose, phase, whole, count))
        if has_experts and grid.expert_tensor == 1 and not config.parallel.sequence_parallel:
            found.append(Collective("all_gather", "tensor", "experts' output", phase, whole // grid.tensor, count))
    if has_experts and grid.expert > 1:
        routed = tokens if grid.expert_tensor > 1 else tokens // grid.tensor
        kept = 1.0 if config.moe.dropless else min(1.0, config.moe.capacity_factor)
        rows = int(routed * config.moe.top_k * kept) * sizes.hidden * size
        for phase in phases:
            found += [Collective("all_to_all", "expert", purpose, phase, rows, count)
                      for purpose in ("dispatch", "combine")]  # fmt: skip
    return found


def _sends(config: Config, grid: Grid, pipeline_rank: int, count: int) -> list[Collective]:
    sizes, chunks = dimensions(config.model, config.moe), config.parallel.virtual_pipeline_parallel_size
    tokens = config.run.micro_batch_size * config.model.seq_length
    cut = grid.tensor if config.parallel.sequence_parallel else 1
    message = tokens // cut * sizes.hidden * SIZE[config.run.precision]
    found = []
    if grid.pipeline == 1:
        return found
    ahead = chunks - (pipeline_rank == grid.pipeline - 1)  # chunks whose output goes on
    behind = chunks - (pipeline_rank == 0)
    for kind, phase, times in (("receive", "forward", behind), ("send", "forward", ahead),
                               ("receive", "backward", ahead), ("send", "backward", behind)):  # fmt: skip
        if times:
            found.append(Collective(kind, "pipeline", "activations", phase, message, count * times))
    return found


def _gradients(config: Config, grid: Grid, pipeline_rank: int) -> list[Collective]:
    chunks, size = config.parallel.virtual_pipeline_parallel_size, SIZE[config.run.precision]
    table, elements = param_table(config.model, config.moe), {"data": 0, "expert_data": 0}
    for chunk in range(chunks):
        for parameter in chunk_parameters(
            table, num_layers=config.model.num_layers, pipeline=grid.pipeline, virtual=chunks,
            pipeline_rank=pipeline_rank, chunk=chunk,
        ):  # fmt: skip
            count = 1
            for extent in local_shape(parameter, grid):
                count *= extent
            elements["expert_data" if parameter.kind == "expert" else "data"] += count
    found = []
    for family, number in elements.items():
        ranks = grid.data if family == "data" else grid.expert_data
        if ranks == 1 or not number:
            continue
        kind = "expert" if family == "expert_data" else "dense"
        if config.parallel.zero_stage == 0:
            found.append(Collective("all_reduce", family, f"{kind} gradients", "update", 4 * number, 1))
        else:
            found.append(Collective("reduce_scatter", family, f"{kind} gradients", "update", 4 * number, 1))
            found.append(Collective("all_gather", family, f"{kind} weights", "update", size * number // ranks, 1))
    return found
