"""From what each rank saw to what the run reports: losses, loads, memory, reduced over all ranks at an interval."""

import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config.schema import MoEConfig
from megamoe.model.parallel import ParallelGroups
from megamoe.moe.statistics import SUMS, LoadStatistics
from megamoe.topology.parameters import experts_by_layer

if TYPE_CHECKING:
    from megamoe.training.build import Trainer


@dataclass
class LossMeter:
    """Sums language losses over micro-batches; only the last stage of a pipeline sees any."""

    total: float | Tensor = 0.0
    count: int = 0

    def add(self, lm_losses: Tensor | None) -> None:
        """lm_losses of any shape, kept on their device: nothing waits here."""
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
    """Loads of all MoE layers over all ranks since the last report. Shares of load are means over the layers."""

    balance_loss: float  # mean over micro-batches, summed over layers; equals the number of MoE layers when even
    z_loss: float  # likewise; 0 where it is off
    dropped_fraction: float  # of all assignments
    dropped_by_choice: list[float]  # of the first choices, of the second ones, …
    max_over_mean: float  # demand of the fullest expert over the mean, of the least even layer
    entropy: float  # of the demand over its largest value log E: 1 when even, 0 when one expert has all; E by layer
    top_fifth_share: float  # of the demand that fell on the fullest fifth of the experts
    bottom_fifth_share: float
    unused_experts: int  # experts of all layers that nobody chose
    router_logit_rms: float  # root mean square
    by_layer: dict[int, list[float]] = field(default_factory=dict)  # layer -> demand of each expert


def load_report(trainer: "Trainer") -> LoadReport | None:
    """Take and reduce the statistics, in one all-reduce; None for a dense model. Collective over all ranks."""
    config = trainer.config
    num_experts = experts_by_layer(config.model, config.moe)
    if not num_experts:
        return None
    rows = _local_rows(trainer.statistics, num_experts, config.moe.top_k)
    dist.all_reduce(rows, group=trainer.groups.world)
    return summarize(rows.cpu(), num_experts, config.moe.top_k)


def summarize(rows: Tensor, num_experts: Mapping[int, int], top_k: int) -> LoadReport:
    """rows [MoE layers, max E + k + sums + 1] as `_local_rows` lays them out, summed over ranks -> the report.

    `num_experts` has the experts E of each MoE layer, ascending by layer: what lies beyond them in a row is no expert.
    """
    padded, dropped, sums, count = rows.split([max(num_experts.values()), top_k, len(SUMS), 1], dim=1)
    balance, z, square = (sums / count.clamp(min=1)).unbind(1)
    demands = [row[:size] for row, size in zip(padded, num_experts.values(), strict=True)]
    total = padded.sum().clamp(min=1)
    shares = [(demand / demand.sum().clamp(min=1)).sort().values for demand in demands]  # emptiest expert first
    fifths = [(share, math.ceil(len(share) / 5)) for share in shares]
    return LoadReport(
        balance_loss=float(balance.sum()),
        z_loss=float(z.sum()),
        dropped_fraction=float(dropped.sum() / total),
        dropped_by_choice=(dropped.sum(dim=0) / (total / top_k)).tolist(),
        max_over_mean=max(float(share[-1]) * len(share) for share in shares),
        entropy=fmean(float(torch.special.entr(share).sum()) / math.log(max(2, len(share))) for share in shares),
        top_fifth_share=fmean(float(share[-fifth:].sum()) for share, fifth in fifths),
        bottom_fifth_share=fmean(float(share[:fifth].sum()) for share, fifth in fifths),
        unused_experts=sum(int((demand == 0).sum()) for demand in demands),
        router_logit_rms=float(square.sqrt().mean()),
        by_layer={layer: demand.tolist() for layer, demand in zip(num_experts, demands, strict=True)},
    )


def load_loss(moe: MoEConfig, load: LoadReport | None) -> float:
    """What routing adds to the language loss."""
    return moe.balance_loss_coeff * load.balance_loss + moe.z_loss_coeff * load.z_loss if load else 0.0


def load_metrics(moe: MoEConfig, load: LoadReport) -> dict[str, float]:
    """The keys of a training line that tell of routing."""
    metrics = {
        "aux_loss": load.balance_loss,
        "dropped_fraction": load.dropped_fraction,
        "dropped_first_fraction": load.dropped_by_choice[0],
        "expert_load_max_over_mean": load.max_over_mean,
        "expert_load_entropy": load.entropy,
        "expert_load_top_fifth": load.top_fifth_share,
        "expert_load_bottom_fifth": load.bottom_fifth_share,
        "unused_experts": load.unused_experts,
        "router_logit_rms": load.router_logit_rms,
    }
    if moe.top_k > 1:
        metrics["dropped_second_fraction"] = load.dropped_by_choice[1]
    if moe.z_loss_coeff > 0.0:
        metrics["z_loss"] = load.z_loss
    return metrics


LayerLoads = Mapping[int, Sequence[float]]  # layer -> tokens that each of its experts was sent, dropped ones too


class LoadMeter:
    """Adds up what reports say of the experts' loads, and passes it on with the first report of each interval."""

    def __init__(self, interval_steps: int, record: Callable[[int, LayerLoads], None]) -> None:
        self.interval_steps, self.record = interval_steps, record
        self.begin(0)

    def begin(self, step: int) -> None:
        self._sums: dict[int, list[float]] = {}
        self._interval = step // self.interval_steps if self.interval_steps else 0

    def add(self, step: int, load: LoadReport) -> dict[str, int]:
        """Where an interval is over, {"dead_experts": those of all layers that got nothing in it}; else nothing."""
        if not self.interval_steps:
            return {}
        for layer, demand in load.by_layer.items():
            before = self._sums.get(layer, [0.0] * len(demand))
            self._sums[layer] = [one + other for one, other in zip(before, demand, strict=True)]
        if step // self.interval_steps == self._interval:
            return {}
        sums = self._sums
        self.begin(step)
        self.record(step, sums)
        return {"dead_experts": sum(count == 0 for counts in sums.values() for count in counts)}


def _local_rows(statistics: LoadStatistics, num_experts: Mapping[int, int], top_k: int) -> Tensor:
    """[MoE layers, max E + k + sums + 1] fp64: demand of each expert, drops of each choice, SUMS, micro-batches."""
    layers, widest = list(num_experts), max(num_experts.values())
    rows = torch.zeros((len(layers), widest + top_k + len(SUMS) + 1), dtype=torch.float64, device=_device())
    for layer, load in statistics.take().items():
        row = rows[layers.index(layer)]
        row[: len(load.demand)] = load.demand
        row[widest:-1] = torch.cat([load.dropped_by_choice, load.sums])
        row[-1] = load.num_micro_batches
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
