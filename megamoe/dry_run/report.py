"""All roles of a job, played and held against the plan, and what is said of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.dry_run.compare import Difference, called_collectives, differences
from megamoe.dry_run.rehearsal import Rehearsal
from megamoe.dry_run.roles import RankReality, play_rank
from megamoe.plan.activations import activation_bytes
from megamoe.plan.cluster import Cluster
from megamoe.plan.memory import role_memory
from megamoe.plan.quantities import Load
from megamoe.plan.roles import Role, roles

GIB = 2**30
ACTIVATION_TOLERANCE = 0.1
PEAK_TOLERANCE = 0.05  # by which a plan may promise less than is needed; it may well promise more


@dataclass(frozen=True)
class RoleCheck:
    """One role: what it was, what its plan says differently, and whether a rank's memory holds it."""

    pipeline_ranks: tuple[int, ...]
    reality: RankReality
    planned_activation_bytes: int
    differences: tuple[Difference, ...]
    peak_bytes: int  # of everything alive, the cluster's overhead included
    planned_peak_bytes: int
    memory_bytes: int | None  # None: no cluster was given
    seconds: float

    @property
    def is_good(self) -> bool:
        return not self.differences and (self.memory_bytes is None or self.peak_bytes <= self.memory_bytes)


def check_job(
    config: Config, world_size: int, load: Load, cluster: Cluster | None, progress: Callable[[str], None]
) -> tuple[RoleCheck, ...]:
    """Play every role. Raises ConfigError or TopologyError where the job could not start."""
    validate(config, world_size)
    checks, distinct = [], roles(config, world_size)
    for number, role in enumerate(distinct, 1):
        progress(f"role {number} of {len(distinct)}: pipeline rank {role.pipeline_rank}")
        checks.append(_check(config, world_size, load, cluster, role))
    return tuple(checks)


def _check(config: Config, world_size: int, load: Load, cluster: Cluster | None, role: Role) -> RoleCheck:
    started = time.monotonic()
    reality = play_rank(config, world_size, role.pipeline_rank, load)
    overhead = 0 if cluster is None else cluster.overhead_bytes
    peak = max(reality.schedule_peak_bytes, reality.update_peak_bytes) + overhead
    saved = activation_bytes(config, world_size, role.pipeline_rank, load=load)
    planned_peak = role_memory(config, world_size, role, load, overhead_bytes=overhead).num_bytes.total
    found = list(differences(config, world_size, reality, load))
    if abs(saved - reality.activation_bytes) > ACTIVATION_TOLERANCE * reality.activation_bytes:
        found.append(Difference(reality.rank, "bytes of saved activations", saved, reality.activation_bytes))
    if planned_peak < (1 - PEAK_TOLERANCE) * peak:
        found.append(Difference(reality.rank, "bytes at the fullest moment", planned_peak, peak))
    return RoleCheck(
        pipeline_ranks=role.pipeline_ranks,
        reality=reality,
        planned_activation_bytes=saved,
        differences=tuple(found),
        peak_bytes=peak,
        planned_peak_bytes=planned_peak,
        memory_bytes=None if cluster is None else cluster.memory_bytes,
        seconds=time.monotonic() - started,
    )


def check_text(checks: tuple[RoleCheck, ...], world_size: int, rehearsal: Rehearsal | None) -> str:
    """A few lines a role, and a verdict."""
    lines = [line for check in checks for line in _lines(check)]
    bad = [check for check in checks if not check.is_good]
    noun = "role" if len(checks) == 1 else "roles"
    played = f"{len(checks)} {noun} of {world_size} ranks played in {sum(check.seconds for check in checks):.0f} s"
    verdict = "all as planned" if not bad else f"{len(bad)} not as they should be"
    lines += ["", f"{played}: {verdict}"]
    if rehearsal is not None:
        losses = ", ".join(f"{loss:.4f}" for loss in rehearsal.losses)
        lines.append(f"two real steps on {rehearsal.folded.world_size} ranks of this machine: losses {losses}")
        lines.append(f"  folded down: {', '.join(rehearsal.folded.notes)}")
    return "\n".join(lines) + "\n"


def _lines(check: RoleCheck) -> Iterator[str]:
    reality, states = check.reality, check.reality.states
    ranks = ", ".join(map(str, check.pipeline_ranks))
    yield f"pipeline rank {ranks} (rank {reality.rank} was played, {reality.num_played} micro-batches)"
    yield (
        f"  weights {_size(states.weights)}, gradients {_size(states.gradients)}, optimizer {_size(states.optimizer)}"
    )
    yield (
        f"  saved activations {_size(reality.activation_bytes)}, planned "
        f"{_size(check.planned_activation_bytes)}; micro-batches in flight {', '.join(map(str, reality.in_flight))}"
    )
    calls = called_collectives(reality)
    yield f"  {sum(calls.values()):,} collectives and messages of {len(calls)} kinds and sizes in a step"
    memory = "" if check.memory_bytes is None else f" of {_size(check.memory_bytes)}"
    yield f"  peak {_size(check.peak_bytes)}{memory}, planned {_size(check.planned_peak_bytes)}"
    if check.memory_bytes is not None and check.peak_bytes > check.memory_bytes:
        yield f"  OUT OF MEMORY: {_size(check.peak_bytes - check.memory_bytes)} are missing"
    for each in check.differences:
        yield f"  NOT AS PLANNED: {each}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.2f} MiB"


def check_tree(checks: tuple[RoleCheck, ...], world_size: int, rehearsal: Rehearsal | None) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "world_size": world_size,
        "is_good": all(check.is_good for check in checks),
        "rehearsal": None if rehearsal is None else {
            "world_size": rehearsal.folded.world_size,
            "losses": list(rehearsal.losses),
            "grad_norms": list(rehearsal.grad_norms),
            "notes": list(rehearsal.folded.notes),
        },
        "roles": [
            {
                "pipeline_ranks": list(check.pipeline_ranks),
                "rank": check.reality.rank,
                "bytes": asdict(check.reality.states),
                "activation_bytes": check.reality.activation_bytes,
                "planned_activation_bytes": check.planned_activation_bytes,
                "peak_bytes": check.peak_bytes,
                "planned_peak_bytes": check.planned_peak_bytes,
                "memory_bytes": check.memory_bytes,
                "num_collectives": sum(called_collectives(check.reality).values()),
                "differences": [str(each) for each in check.differences],
                "seconds": check.seconds,
            }
            for check in checks
        ],
    }
