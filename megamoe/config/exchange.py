"""Checks of how tokens travel to their experts, which `validation` runs."""

from collections import Counter

from megamoe.config.schema import Config, ParallelConfig
from megamoe.config.structure import expert_counts
from megamoe.errors import ConfigError


def check_exchange(config: Config) -> None:
    """Raises ConfigError where the settings of all-to-all do not fit the experts."""
    parallel = config.parallel
    if config.moe.num_experts == 0:
        for key, value, without in (
            ("all_to_all_chunks", parallel.all_to_all_chunks, 1), ("all_to_all", parallel.all_to_all, "flat"),
        ):  # fmt: skip
            if value != without:
                raise ConfigError(f"{key} {value} needs experts, but num_experts is 0: use {key} {without}")
        return
    for key, num_experts in expert_counts(config.moe).items():
        _check_chunks(parallel, key, num_experts)


def _check_chunks(parallel: ParallelConfig, key: str, num_experts: int) -> None:
    """For one number of experts that layers have, `key` in a message; expert_parallel_size is known to divide it."""
    chunks, of_rank = parallel.all_to_all_chunks, num_experts // parallel.expert_parallel_size
    if of_rank % chunks:
        valid = ", ".join(str(n) for n in range(1, of_rank + 1) if of_rank % n == 0)
        raise ConfigError(
            f"all_to_all_chunks {chunks} does not divide the experts of a rank, {key} {num_experts} / "
            f"expert_parallel_size {parallel.expert_parallel_size} = {of_rank}: use {valid}"
        )


def check_nodes(parallel: ParallelConfig, world_size: int) -> None:
    """Raises ConfigError where hierarchical all-to-all meets expert groups that lie unequally on their nodes.

    Where ranks_per_node is not set, what the launcher says is checked the same way when groups are made.
    """
    if parallel.all_to_all == "flat" or parallel.ranks_per_node is None:
        return
    if not _is_even(parallel, parallel.ranks_per_node, world_size):
        sizes = (n for n in range(1, world_size + 1) if world_size % n == 0)
        valid = ", ".join(str(n) for n in sizes if _is_even(parallel, n, world_size))
        raise ConfigError(
            f"ranks_per_node {parallel.ranks_per_node} puts unequal numbers of an expert group's ranks on its nodes, "
            f"which all_to_all hierarchical cannot use: use ranks_per_node {valid}, or all_to_all flat"
        )


def _is_even(parallel: ParallelConfig, ranks_per_node: int, world_size: int) -> bool:
    """Whether every expert group has equally many ranks on each of its nodes; the groups are those of the rank grid."""
    size, stride = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    for start in range(world_size):
        if start % (size * stride) < stride:
            on_node = Counter((start + stride * member) // ranks_per_node for member in range(size))
            if len(set(on_node.values())) > 1:
                return False
    return True
