"""From what each rank saw to what the run reports: losses, loads, memory, reduced over all ranks at an interval."""

import resource
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.model.parallel import ParallelGroups
from megamoe.moe.statistics import LoadStatistics
from megamoe.topology.parameters import moe_layers

if TYPE_CHECKING:
    from megamoe.training.build import Trainer


@dataclass
class LossMeter:
    """Sums language losses over micro-batches; only the last stage of a pipeline sees any."""

    total: float | Tensor = 0.0
    count: int = 0

    def add(self, lm_losses: Tensor | None) -> None:
        """lm_losses [num_micro_batches], kept on their device: nothing waits here."""
        if lm_losses is not None:
            self.total = self.total + lm_losses.double().sum()
            self.count += lm_losses.numel()

    def mean(self, groups: ParallelGroups) -> float:
        """The mean over all micro-batches of all data ranks since the last call. Collective over all ranks."""
        speaks = groups.coordinates.tensor == 0
        values = torch.tensor([float(self.total) if speaks else 0.0, float(self.count) if speaks else 0.0],
                              dtype=torch.float64, device=_device())  # fmt: skip
        dist.all_reduce(values, group=groups.world)
        self.total, self.count = 0.0, 0
        return float(values[0] / values[1]) if values[1] else float("nan")


@dataclass(frozen=True)
class LoadReport:
    """Loads of all MoE layers over all ranks since the last report."""

    balance_loss: float  # mean over micro-batches, summed over layers; equals the number of MoE layers when even
    dropped_fraction: float  # of all assignments
    max_over_mean: float  # demand of the fullest expert over the mean, of the least even layer
    by_layer: dict[int, list[float]] = field(default_factory=dict)  # layer -> demand of each expert


def load_report(trainer: "Trainer") -> LoadReport | None:
    """Take and reduce the statistics; None for a dense model. Collective over all ranks."""
    config = trainer.config
    layers = moe_layers(config.model, config.moe)
    if not layers:
        return None
    rows = _local_rows(trainer.statistics, layers, config.moe.num_experts)
    dist.all_reduce(rows, group=trainer.groups.world)
    demand, (dropped, loss, count) = rows[:, :-3], rows[:, -3:].unbind(1)
    total = demand.sum()
    return LoadReport(
        balance_loss=float((loss / count.clamp(min=1)).sum()),
        dropped_fraction=float(dropped.sum() / total.clamp(min=1)),
        max_over_mean=float((demand.amax(1) / demand.mean(1).clamp(min=1e-9)).max()),
        by_layer={layer: demand[row].tolist() for row, layer in enumerate(layers)},
    )


def _local_rows(statistics: LoadStatistics, layers: tuple[int, ...], num_experts: int) -> Tensor:
    """[MoE layers, E + 3] fp64: demand of each expert, dropped, sum of balance losses, number of micro-batches."""
    rows = torch.zeros((len(layers), num_experts + 3), dtype=torch.float64, device=_device())
    for layer, load in statistics.take().items():
        row = rows[layers.index(layer)]
        row[:num_experts] = load.demand
        row[num_experts], row[num_experts + 1] = load.dropped, load.balance_loss
        row[num_experts + 2] = load.num_micro_batches
    return rows


def peak_memory_bytes(groups: ParallelGroups) -> int:
    """The most memory any rank has had in use: of its GPU, or of its process. Collective over all ranks."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = torch.tensor(peak, dtype=torch.int64, device=_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=groups.world)
    return int(value)


def state_bytes(trainer: "Trainer") -> dict[str, int]:
    """Bytes this rank holds in weights, gradients and optimizer state, as ZeRO cuts them, and what the update adds.

    "update" is short-lived: ZeRO flattens the gradients it owns, at stage 1 in 16-bit precision after a copy in fp32.
    """
    weights = sum(local.tensor.numel() * local.tensor.element_size() for local in trainer.parameters)
    num_elements = sum(local.tensor.numel() for local in trainer.parameters)
    accumulated = num_elements * 4  # gradients are accumulated in fp32 whatever the precision
    states_per_element = 2 if trainer.config.optimizer.name == "adamw" else int(trainer.config.optimizer.momentum > 0)
    if trainer.engine.zero_stage == 0:
        optimizer = num_elements * 4 * states_per_element
        return {"weights": weights, "gradients": accumulated, "optimizer": optimizer, "update": 0}
    owned = sum(group.numel() for group in trainer.engine.optimizer.single_partition_of_fp32_groups)
    if trainer.engine.zero_stage == 2:
        accumulated = owned * 4
    copies = 2 if trainer.engine.zero_stage == 1 and trainer.config.run.precision != "fp32" else 1
    return {
        "weights": weights,
        "gradients": accumulated,
        "optimizer": owned * 4 * (1 + states_per_element),
        "update": owned * 4 * copies,
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
