"""A plan: what a configuration needs on a cluster, role by role, and what its run takes. No torch."""

import math
from dataclasses import dataclass

from megamoe.config.schema import Config, ParallelConfig
from megamoe.config.validation import validate
from megamoe.plan.cluster import Cluster
from megamoe.plan.collectives import step_collectives
from megamoe.plan.lifetime import Lifetime, lifetime
from megamoe.plan.memory import RoleMemory, role_memory
from megamoe.plan.quantities import Collective, Load
from megamoe.plan.roles import Role, roles
from megamoe.plan.timing import StepTime, StepTimer
from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table


@dataclass(frozen=True)
class RolePlan:
    """What one rank of a role holds at its fullest moment and calls in one step."""

    role: Role
    memory: RoleMemory
    collectives: tuple[Collective, ...]


@dataclass(frozen=True)
class Plan:
    """`load` is the imbalance that memory and time are planned for; roles are in the order of the pipeline."""

    config: Config
    cluster: Cluster
    world_size: int
    load: Load
    num_parameters: int
    num_active_parameters: int
    roles: tuple[RolePlan, ...]
    step: StepTime
    lifetime: Lifetime

    @property
    def worst(self) -> RolePlan:
        """The role that needs most memory."""
        return max(self.roles, key=lambda each: each.memory.num_bytes.total)

    @property
    def free_bytes(self) -> int:
        """What is left on the fullest rank; negative: what is missing."""
        return self.cluster.memory_bytes - self.worst.memory.num_bytes.total

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks that the layout folds."""
    tensor, experts = parallel.tensor_parallel_size, parallel.expert_parallel_size
    return parallel.pipeline_parallel_size * math.lcm(tensor, experts * parallel.expert_tensor_parallel_size)


def make_plan(
    config: Config, cluster: Cluster, world_size: int, load: Load | None = None, *, num_tokens: int | None = None
) -> Plan:
    """Plan `config` on `world_size` GPUs. `num_tokens`: the budget of the run; None: what run.num_steps takes.

    Raises ConfigError or TopologyError where sizes do not go together, or where the cluster lacks the precision.
    """
    validate(config, world_size)
    load, table = load or Load(), param_table(config.model, config.moe)
    timer = StepTimer(config, cluster, world_size, load=load)
    step = timer.time()
    return Plan(
        config=config,
        cluster=cluster,
        world_size=world_size,
        load=load,
        num_parameters=num_parameters(table),
        num_active_parameters=num_active_parameters(table, config.moe),
        roles=tuple(
            RolePlan(
                role,
                role_memory(config, world_size, role, load, overhead_bytes=cluster.overhead_bytes),
                step_collectives(
                    config, world_size, role.pipeline_rank, rows_sent=timer.compute.most_rows.sent,
                    ranks_per_node=cluster.ranks_per_node,
                ),
            )
            for role in roles(config, world_size)
        ),
        step=step,
        lifetime=lifetime(
            config, cluster, world_size, step.seconds, num_tokens=num_tokens, async_save=config.checkpoint.async_save
        ),
    )  # fmt: skip
