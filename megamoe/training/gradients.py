"""What happens to gradients between their reduction and the update: the sums no engine makes, scaling, the norm.

It works on slices, because under ZeRO a rank owns only a part of each reduced gradient; summing over a tensor group
commutes with that, as its ranks cut their equal parameters at equal places.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.model.naming import LocalParameter
from megamoe.model.parallel import ParallelGroups
from megamoe.moe.host_read import read_numbers
from megamoe.phases import phase
from megamoe.topology.parameters import is_output_tied
from megamoe.topology.reductions import is_summed_over_tensor, is_whole_on_each_tensor_rank


@dataclass(frozen=True)
class GradientSlice:
    """Elements [start, start + len(values)) of a parameter's flattened gradient. `values` is a view: writes count."""

    local: LocalParameter
    values: Tensor  # [n]
    start: int


class GradientFinalizer:
    """Finishes the gradients of one step and measures them. `norm` is the last global norm, without loss scale.

    What else all ranks must know of a step rides along in the all-reduce of the norm, which every step has anyway:
    `stop_wanted` (by a signal) may be set on any rank at any time, `sees_stop_file` is asked on every rank, and after
    the step `stop_agreed` (by either) and `stop_file_agreed` tell all of it; of `lm_losses`, this rank's of the step
    under way, `loss` is the mean over all ranks (None: no rank had any). `refuse` is asked with loss and norm, the same
    on every rank, before the update: `is_refused` is its answer.
    """

    def __init__(self, parameters: Sequence[LocalParameter], groups: ParallelGroups, config: Config) -> None:
        self.by_tensor = {id(local.tensor): local for local in parameters}
        self.clip_grad = config.optimizer.clip_grad
        self.norm = math.nan
        self.stop_wanted = self.stop_agreed = self.stop_file_agreed = False
        self.sees_stop_file: Callable[[], bool] = lambda: False
        self.lm_losses: Tensor | None = None  # [num_micro_batches], on the last stage
        self.loss: float | None = None
        self.refuse: Callable[[float | None, float], bool] = lambda loss, norm: False
        self.is_refused = False
        self._groups, self._parallel = groups, config.parallel
        is_embedding_trained = any(local.parameter.kind == "embedding" for local in parameters)
        self._is_tied = is_output_tied(config.model) and groups.grid.pipeline > 1 and is_embedding_trained
        self._expert_scale = 1.0
        if config.optimizer.expert_grad_scaling == "sqrt_world_size":
            num_ranks = config.optimizer.expert_grad_world_size or config.parallel.expert_parallel_size
            self._expert_scale = math.sqrt(num_ranks)

    @phase("reduce")
    def finalize(self, slices: Sequence[GradientSlice], *, scale: float) -> float:
        """Complete the gradients in place and return their global norm divided by `scale` (the loss scale).

        `slices` cover, over the data-parallel (for experts: expert-data) ranks, each gradient once (ZeRO 1, 2), or
        each rank's gradients whole (ZeRO 0). Collective over all ranks; the result is the same on all.
        """
        self._sum_over_tensor_group(slices)
        self._sum_tied_embedding(slices)
        if self._expert_scale != 1.0:
            for piece in slices:
                if piece.local.parameter.kind == "expert":
                    piece.values.mul_(self._expert_scale)
        self.norm = self._global_norm(slices) / scale
        self.is_refused = self.refuse(self.loss, self.norm)
        return self.norm

    def _sum_over_tensor_group(self, slices: Sequence[GradientSlice]) -> None:
        """One all-reduce for all gradients that tensor ranks computed in parts."""
        parts = [s.values for s in slices if is_summed_over_tensor(s.local.parameter, self._parallel)]
        if not parts:
            return
        packed = torch.cat(parts)
        dist.all_reduce(packed, group=self._groups.tensor)
        for part, total in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
            part.copy_(total)

    def _sum_tied_embedding(self, slices: Sequence[GradientSlice]) -> None:
        """Add the gradients of both copies of the embedding, whose stages cut their partitions at different places."""
        if not self._is_tied or self._groups.tied_embedding is None:
            return
        local = next(each for each in self.by_tensor.values() if each.parameter.kind == "embedding")
        own = [s for s in slices if s.local is local]
        total = torch.zeros(local.tensor.numel(), dtype=torch.float32, device=local.tensor.device)
        # At stage 0 every data rank has the whole gradient: one speaks for all.
        if self._parallel.zero_stage > 0 or self._groups.coordinates.data == 0:
            for piece in own:
                total[piece.start : piece.start + piece.values.numel()] = piece.values
        dist.all_reduce(total, group=self._groups.tied_embedding)
        for piece in own:
            piece.values.copy_(total[piece.start : piece.start + piece.values.numel()])

    def _global_norm(self, slices: Sequence[GradientSlice]) -> float:
        """L2 norm over all parameters of the model, each counted once, in fp64."""
        device = self._groups_device(slices)
        square_sum = torch.zeros((), dtype=torch.float64, device=device)
        counted = [s.values for s in slices if self._is_counted(s.local)]
        if counted:
            norms = torch._foreach_norm(counted, 2, dtype=torch.float32)
            square_sum = torch.stack(norms).double().square().sum()
        copies = [s.values for s in slices if self._is_tensor_copy(s.local)]
        if copies:  # count as nothing, but one that is not finite makes the sum so
            square_sum = square_sum + 0.0 * torch.stack(torch._foreach_norm(copies, 2, dtype=torch.float32)).sum()
        # Tensor ranks hold the same losses: one of them speaks.
        losses = self.lm_losses if self._groups.coordinates.tensor == 0 else None
        loss_sum = torch.zeros_like(square_sum) if losses is None else losses.double().sum()
        counts = (0 if losses is None else losses.numel(), self.stop_wanted, self.sees_stop_file())
        sums = torch.stack([square_sum, loss_sum, *(torch.full_like(square_sum, float(count)) for count in counts)])
        dist.all_reduce(sums, group=self._groups.world)
        value, loss_sum, num_losses, num_signals, num_files = read_numbers(sums, "gradient norm")
        self.loss = loss_sum / num_losses if num_losses else None
        self.stop_file_agreed = num_files > 0
        self.stop_agreed = num_signals > 0 or self.stop_file_agreed
        return math.sqrt(value) if math.isfinite(value) else math.inf

    def _groups_device(self, slices: Sequence[GradientSlice]) -> torch.device:
        return slices[0].values.device if slices else next(iter(self.by_tensor.values())).tensor.device

    def _is_counted(self, local: LocalParameter) -> bool:
        at, parameter = self._groups.coordinates, local.parameter
        is_expert = parameter.kind == "expert"
        if local.tied_copy:
            return False
        if self._is_tensor_copy(local):
            return False
        if self._parallel.zero_stage > 0:
            return True
        return (at.expert_data if is_expert else at.data) == 0

    def _is_tensor_copy(self, local: LocalParameter) -> bool:
        """Whether another rank of the tensor group counts this parameter's gradient."""
        at, parameter = self._groups.coordinates, local.parameter
        copy = at.expert_tensor if parameter.kind == "expert" else at.tensor
        return copy != 0 and is_whole_on_each_tensor_rank(parameter, self._parallel)
