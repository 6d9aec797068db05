"""What the optimizer holds on this rank, by parameter: masters, moments, the count of its steps.

At ZeRO stage 0 that is each local part whole. At stages 1 and 2 DeepSpeed lays the parameters of an optimizer group one
after another into a flat buffer, pads its end, and cuts it into equal partitions, one a rank of the group's
data-parallel (for experts: expert-data-parallel) group; a rank's masters and moments are its partition's, so they are
a run of elements of each parameter that the partition meets, and what is left over is padding, which is no state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.errors import MegamoeError
from megamoe.model.naming import LocalParameter

if TYPE_CHECKING:
    from megamoe.training.build import Trainer
    from megamoe.training.engine import ScheduleEngine


@dataclass(frozen=True)
class OptimizerPart:
    """Elements [first, last) of a local part, row-major, that this rank's optimizer updates. Views: writes count."""

    local: LocalParameter
    first: int
    last: int
    master: Tensor  # [last - first], fp32; at stage 0 the weight itself
    moments: dict[str, Tensor]  # "exp_avg", "exp_avg_sq", "momentum_buffer" -> [last - first], fp32


def optimizer_parts(trainer: "Trainer") -> list[OptimizerPart]:
    """Everything this rank's optimizer updates, in the optimizer's order; fresh state is made where there is none."""
    create_state(trainer.engine.basic_optimizer)
    by_tensor = {id(local.tensor): local for local in trainer.parameters}
    if trainer.engine.zero_stage > 0:
        return list(_partitioned_parts(trainer.engine, by_tensor))
    state, parts = trainer.engine.basic_optimizer.state, []
    for group in trainer.engine.basic_optimizer.param_groups:
        for tensor in group["params"]:
            local = by_tensor[id(tensor)]
            moments = {name: value.view(-1) for name, value in _moments(state[tensor])}
            parts.append(OptimizerPart(local, 0, tensor.numel(), tensor.detach().view(-1), moments))
    return parts


def _partitioned_parts(engine: "ScheduleEngine", by_tensor: dict[int, LocalParameter]) -> Iterator[OptimizerPart]:
    zero = engine.optimizer
    for index, partition in enumerate(zero.single_partition_of_fp32_groups):
        size = partition.numel()
        begin = size * dist.get_rank(zero.real_dp_process_group[index])
        moments = dict(_moments(engine.basic_optimizer.state[partition]))
        # The order in the flat buffer, which DeepSpeed may deal round robin, and each parameter's place in it.
        members = zip(zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True)
        for tensor, offset in members:
            first, last = max(offset, begin), min(offset + tensor.numel(), begin + size)
            if first >= last:
                continue
            here = slice(first - begin, last - begin)
            yield OptimizerPart(
                by_tensor[id(tensor)],
                first - offset,
                last - offset,
                partition.detach()[here],
                {name: value[here] for name, value in moments.items()},
            )


def _moments(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if torch.is_tensor(value) and name != "step":
            yield name, value


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh optimizer the state tensors that its first step would make: a run may be saved before it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _create_state(optimizer, group, parameter)


def _create_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    if state:
        return
    if isinstance(optimizer, torch.optim.SGD):
        if group["momentum"] > 0.0:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def num_optimizer_steps(optimizer: torch.optim.Optimizer) -> int | None:
    """Updates applied so far, which Adam corrects its bias by; None for an optimizer that does not count.

    torch counts by parameter, NVIDIA apex by group. Raises MegamoeError where the counts differ, which no layout could
    take over.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return None
    counts = {int(group.get("step", 0)) for group in optimizer.param_groups if not _counts_by_parameter(optimizer)}
    if _counts_by_parameter(optimizer):
        counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state} or {0}
    if len(counts) != 1:
        raise MegamoeError(f"the optimizer has counted different steps for its parameters: {sorted(counts)}")
    return counts.pop()


def set_num_optimizer_steps(optimizer: torch.optim.Optimizer, num_steps: int | None) -> None:
    """Undo: let the optimizer go on counting from `num_steps`. Its state must exist (`create_state`)."""
    if num_steps is None or isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not _counts_by_parameter(optimizer):
            group["step"] = num_steps
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["step"].fill_(num_steps)


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.AdamW)
