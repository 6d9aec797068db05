"""Every layout that a number of GPUs can be folded into, for the search. No torch."""

import math
from collections.abc import Iterator

from megamoe.config.schema import Config
from megamoe.config.validation import divisors, validate
from megamoe.errors import MegamoeError
from megamoe.plan.cluster import Cluster
from megamoe.topology.parameters import experts_by_layer

MAX_MICRO_BATCH = 64
MAX_VIRTUAL = 8


def folds(config: Config, cluster: Cluster, world_size: int) -> Iterator[Config]:
    """`config` under every fold of the ranks that validation lets pass: tensor, pipeline, virtual, expert and expert
    tensor sizes, each with sequence parallelism wherever there is tensor parallelism to go with it.

    Tensor groups stay inside a node: across, every layer would wait for the slow link four times.
    """
    num_layers, experts = config.model.num_layers, set(experts_by_layer(config.model, config.moe).values())
    shared = math.gcd(*experts) if experts else 1
    for tensor in divisors(math.gcd(cluster.ranks_per_node, world_size)):
        for pipeline in divisors(math.gcd(num_layers, world_size // tensor)):
            for virtual in (n for n in divisors(num_layers // pipeline) if n <= (MAX_VIRTUAL if pipeline > 1 else 1)):
                for expert_tensor in sorted({1, tensor}) if experts else (1,):
                    stage_ranks = world_size // pipeline
                    for expert in divisors(math.gcd(shared, stage_ranks // expert_tensor)):
                        sizes = {
                            "tensor_parallel_size": tensor,
                            "pipeline_parallel_size": pipeline,
                            "virtual_pipeline_parallel_size": virtual,
                            "expert_parallel_size": expert,
                            "expert_tensor_parallel_size": expert_tensor,
                            "sequence_parallel": tensor > 1,
                            "all_to_all": "flat",
                        }
                        yield from _if_valid(changed(config, parallel=sizes), world_size)


def with_batches(config: Config, world_size: int) -> Iterator[Config]:
    """`config` with every micro-batch size, a power of two, that leaves each pipeline at least a micro-batch."""
    parallel = config.parallel
    data = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    size = 1
    while size <= MAX_MICRO_BATCH and config.run.global_batch_size % (size * data) == 0:
        yield from _if_valid(changed(config, run={"micro_batch_size": size}), world_size)
        size *= 2


def with_exchanges(config: Config, cluster: Cluster, world_size: int) -> Iterator[Config]:
    """Flat all-to-all, and the hierarchical one where expert groups span nodes."""
    yield config
    if config.parallel.expert_parallel_size * config.parallel.expert_tensor_parallel_size > cluster.ranks_per_node:
        hierarchical = {"all_to_all": "hierarchical", "ranks_per_node": cluster.ranks_per_node}
        yield from _if_valid(changed(config, parallel=hierarchical), world_size)


def changed(config: Config, **sections: dict[str, object]) -> Config:
    """`config` with settings of sections replaced by values that are known to be of their type."""
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def _if_valid(config: Config, world_size: int) -> Iterator[Config]:
    try:
        validate(config, world_size)
    except MegamoeError:
        return
    yield config
