"""Pipeline stages: which layers and which parameters lie on which pipeline rank. No torch.

With virtual stages each pipeline rank holds several chunks of the model, dealt out in turn (Narayanan et al. 2021,
interleaved schedule): 8 layers on 2 ranks with 2 chunks each lie as rank 0: 0 1, 4 5; rank 1: 2 3, 6 7.
"""

from collections.abc import Iterable

from megamoe.errors import TopologyError
from megamoe.topology.parameters import Parameter


def layers_per_chunk(num_layers: int, pipeline: int, virtual: int = 1) -> int:
    """Layers of one chunk. Raises TopologyError when the layers cannot be dealt out evenly."""
    chunks = pipeline * virtual
    if num_layers % chunks:
        raise TopologyError(
            f"model.num_layers {num_layers} cannot be split over parallel.pipeline_parallel_size {pipeline} x "
            f"parallel.virtual_pipeline_parallel_size {virtual}: use a multiple of {chunks} layers"
        )
    return num_layers // chunks


def stage_layers(num_layers: int, pipeline: int, virtual: int, pipeline_rank: int, chunk: int = 0) -> range:
    """0-based global layers of chunk `chunk` on pipeline rank `pipeline_rank`, as Megatron-core deals them out.

    Raises TopologyError for layers that do not divide, or a rank or chunk that does not exist.
    """
    count = layers_per_chunk(num_layers, pipeline, virtual)
    if not 0 <= pipeline_rank < pipeline or not 0 <= chunk < virtual:
        raise TopologyError(
            f"there is no chunk {chunk} on pipeline rank {pipeline_rank}: "
            f"chunks go from 0 to {virtual - 1}, pipeline ranks from 0 to {pipeline - 1}"
        )
    first = (chunk * pipeline + pipeline_rank) * count
    return range(first, first + count)


def stage_of_layer(layer: int, num_layers: int, pipeline: int, virtual: int = 1) -> tuple[int, int]:
    """(pipeline rank, chunk) that holds the 0-based global layer. Raises TopologyError as `stage_layers` does."""
    count = layers_per_chunk(num_layers, pipeline, virtual)
    if not 0 <= layer < num_layers:
        raise TopologyError(f"layer {layer} does not exist: layers go from 0 to {num_layers - 1}")
    chunk, pipeline_rank = divmod(layer // count, pipeline)
    return pipeline_rank, chunk


def chunk_parameters(
    table: Iterable[Parameter], *, num_layers: int, pipeline: int, virtual: int, pipeline_rank: int, chunk: int = 0
) -> tuple[Parameter, ...]:
    """The entries of `table` that this chunk holds, in table order.

    The first chunk of all has the embedding; the last has the final norm and the output matrix, or, in a table without
    one (tied embeddings), the embedding once more; of a classifier the last has the head. Raises TopologyError as
    `stage_layers` does.
    """
    table = tuple(table)
    layers = stage_layers(num_layers, pipeline, virtual, pipeline_rank, chunk)
    tied = all(parameter.kind not in ("output", "head") for parameter in table)
    is_first, is_last = layers.start == 0, layers.stop == num_layers

    def held(parameter: Parameter) -> bool:
        if parameter.layer is not None:
            return parameter.layer in layers
        if parameter.kind == "embedding":
            return is_first or (is_last and tied)
        return is_last

    return tuple(parameter for parameter in table if held(parameter))
