"""Which pipeline ranks hold the same kinds of things, and what they hold, tensor by tensor. No torch."""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

from megamoe.config.schema import Config, FinetuneConfig, ModelConfig, MoEConfig
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import Parameter, experts_by_layer, is_output_tied, local_shape, param_table
from megamoe.topology.stages import chunk_parameters, stage_layers
from megamoe.topology.updates import is_frozen


@dataclass(frozen=True)
class HeldParameter:
    """A rank's part of an entry of the parameter table. `tied_copy`: the last stage's copy of a tied embedding."""

    parameter: Parameter
    shape: tuple[int, ...]
    tied_copy: bool = False

    @cached_property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        return self.parameter.kind == "expert"


@dataclass(frozen=True)
class Chunk:
    """Neighbouring layers on one pipeline rank; with virtual stages a rank has several."""

    layers: range  # 0-based, of the whole model
    num_experts: tuple[int, ...]  # of each layer; 0: a dense FFN
    has_embedding: bool
    has_head: bool

    @property
    def kinds(self) -> tuple[object, ...]:
        """Equal for chunks that hold the same kinds of layers."""
        return self.num_experts, self.has_embedding, self.has_head


@dataclass(frozen=True, eq=False)  # found once for each layout: equal roles are one object, and cheap to look up by
class Role:
    """Pipeline ranks that hold the same kinds of layers, in the same order. Layers and parameters are those of the
    first of them, which under 1F1B also keeps the most micro-batches in flight."""

    pipeline_ranks: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    parameters: tuple[HeldParameter, ...]  # in the model's own order, chunk after chunk

    @property
    def pipeline_rank(self) -> int:
        return self.pipeline_ranks[0]

    @property
    def num_layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks)

    @property
    def moe_experts(self) -> tuple[int, ...]:
        """Experts of each MoE layer of the role, over all ranks."""
        return tuple(count for chunk in self.chunks for count in chunk.num_experts if count)

    @cached_property
    def num_elements(self) -> int:
        """Weights of one rank."""
        return sum(held.num_elements for held in self.parameters)

    def chunk_of(self, held: HeldParameter) -> int:
        """The number, among the role's chunks, of the one that a parameter is in."""
        layer = held.parameter.layer
        if layer is None:
            return 0 if held.parameter.kind == "embedding" and not held.tied_copy else len(self.chunks) - 1
        return next(number for number, chunk in enumerate(self.chunks) if layer in chunk.layers)


def roles(config: Config, world_size: int) -> tuple[Role, ...]:
    """The distinct roles of the pipeline, in the order of their first ranks.

    Raises TopologyError or ConfigError where layers or sizes do not divide.
    """
    by_kind: dict[tuple[object, ...], list[int]] = {}
    for pipeline_rank in range(config.parallel.pipeline_parallel_size):
        kinds = tuple(chunk.kinds for chunk in chunks_of(config, pipeline_rank))
        by_kind.setdefault(kinds, []).append(pipeline_rank)
    return tuple(_role(config, world_size, tuple(ranks)) for ranks in by_kind.values())


@lru_cache(maxsize=1024)
def trained_part(role: Role, finetune: FinetuneConfig) -> Role:
    """The role with the parameters that are trained alone: gradients and optimizer state are theirs."""
    if not finetune.freeze:
        return role
    trained = tuple(held for held in role.parameters if not is_frozen(held.parameter, finetune))
    return replace(role, parameters=trained)


def role_of(config: Config, world_size: int, pipeline_rank: int) -> Role:
    """What one pipeline rank holds, as a role of its own. Raises as `roles` does."""
    return _role(config, world_size, (pipeline_rank,))


def chunks_of(config: Config, pipeline_rank: int) -> tuple[Chunk, ...]:
    """The chunks of a pipeline rank. Raises TopologyError for layers that do not divide or a rank that is not there."""
    parallel = config.parallel
    sizes = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    return _chunks(config.model, config.moe, *sizes, pipeline_rank)


@cache
def _chunks(model: ModelConfig, moe: MoEConfig, pipeline: int, virtual: int, pipeline_rank: int) -> tuple[Chunk, ...]:
    num_experts = experts_by_layer(model, moe)
    found = []
    for number in range(virtual):
        layers = stage_layers(model.num_layers, pipeline, virtual, pipeline_rank, number)
        experts = tuple(num_experts.get(layer, 0) for layer in layers)
        found.append(Chunk(layers, experts, layers.start == 0, layers.stop == model.num_layers))
    return tuple(found)


def _role(config: Config, world_size: int, pipeline_ranks: tuple[int, ...]) -> Role:
    grid, virtual = Grid.from_config(config.parallel, world_size), config.parallel.virtual_pipeline_parallel_size
    return _role_on(config.model, config.moe, grid, virtual, pipeline_ranks)


@lru_cache(maxsize=1024)  # a search asks for the same few again and again
def _role_on(model: ModelConfig, moe: MoEConfig, grid: Grid, virtual: int, pipeline_ranks: tuple[int, ...]) -> Role:
    chunks = _chunks(model, moe, grid.pipeline, virtual, pipeline_ranks[0])
    held: list[HeldParameter] = []
    for number, chunk in enumerate(chunks):
        table = chunk_parameters(
            _table(model, moe),
            num_layers=model.num_layers,
            pipeline=grid.pipeline,
            virtual=len(chunks),
            pipeline_rank=pipeline_ranks[0],
            chunk=number,
        )
        held += [_held(parameter, grid, chunk) for parameter in sorted(table, key=_place_in_model)]
        if chunk.has_head and not chunk.has_embedding and held and is_output_tied(model):
            # The model has its output matrix last.
            held.append(held.pop(next(i for i, each in enumerate(held) if each.tied_copy)))
    return Role(tuple(pipeline_ranks), chunks, tuple(held))


def _held(parameter: Parameter, grid: Grid, chunk: Chunk) -> HeldParameter:
    is_copy = parameter.kind == "embedding" and not chunk.has_embedding
    return HeldParameter(parameter, local_shape(parameter, grid), is_copy)


def _place_in_model(parameter: Parameter) -> tuple[float, int]:
    """Sort key: the table's order but for attention, whose modules Megatron-core makes output projection first."""
    layer = math.inf if parameter.layer is None else float(parameter.layer)
    if parameter.layer is None:
        return (-1.0 if parameter.kind == "embedding" else layer), 0
    place = 0 if ".attention_norm." in parameter.name else 1 if ".attention.out." in parameter.name else 2
    return layer, place


@cache
def _table(model: ModelConfig, moe: MoEConfig) -> tuple[Parameter, ...]:
    return param_table(model, moe)
