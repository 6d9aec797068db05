"""A DeepSpeed engine that Megatron-core's schedules drive.

The schedules call the model's chunks and autograd themselves; DeepSpeed's part is what happens to gradients (reduction
over the right group each, partitioning) and to weights (ZeRO step, loss scale). DeepSpeed 0.19.8 expects
`engine(...)`, `engine.backward(loss)` in turn, and a foreign order of backward passes leaves its hooks in a state that
silently loses or rescales gradients. The rules that make it exact, each held by the parity tests:

- gradient accumulation is "unmanaged" and its steps are 1: nothing in DeepSpeed divides by the number of
  micro-batches, which the schedules have done already, and step() alone is the boundary;
- ZeRO stage 1: gradients pile up on the parameters and are reduced once, in step();
- ZeRO stage 2: before every backward pass the hook state is cleared and the pass announced; its end reduces;
- what no engine sums (parts of a tensor group, both copies of a tied embedding), the norm that counts each parameter
  once, and the verdict on non-finite gradients come from `megamoe.training.gradients`, between reduction and update.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from torch import Tensor, nn

from megamoe.config.schema import Config
from megamoe.errors import ConfigError, TrainingStopped
from megamoe.model.naming import LocalParameter
from megamoe.model.parallel import ParallelGroups
from megamoe.phases import phase
from megamoe.topology.updates import reduce_bucket_elements
from megamoe.training.gradients import GradientFinalizer, GradientSlice
from megamoe.training.groups import MpuAdapter


class ScheduleEngine(DeepSpeedEngine):
    """DeepSpeedEngine with the hooks that let a foreign schedule run its module."""

    finalizer: GradientFinalizer
    zero_stage: int

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
        """bf16 with fp32 accumulation at stage 1 goes to the ZeRO optimizer like every other precision.

        DeepSpeed would choose its BF16_Optimizer, which keeps a second full fp32 gradient and reduces differently.
        """
        choice = super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION if choice == BFLOAT16 else choice

    def _configure_distributed_model(self, model: nn.Module) -> None:
        """Where all experts are frozen their gradients need no groups of their own, which DeepSpeed would insist on."""
        super()._configure_distributed_model(model)
        experts = [each for each in self.module.parameters() if is_moe_param(each)]
        if experts and not any(each.requires_grad for each in experts):
            self.has_moe_layers = False

    @property
    def current_loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass: 1 but in fp16."""
        return float(self.optimizer.loss_scale) if self.zero_stage > 0 else 1.0

    def announce_backward(self, output: Tensor) -> None:
        """Hook `output` of a forward pass so that ZeRO stage 2 sees its backward pass begin, whatever came before.

        Lower stages need nothing: their gradients are read in `apply_gradients` alone.
        """
        if self.zero_stage == 2 and output.requires_grad:
            output.register_hook(self._begin_backward)

    def _begin_backward(self, _: Tensor) -> None:
        self.optimizer.clear_backward_seen_flag()
        self._manual_backward_expected = True  # the schedule has scaled the loss
        self._backward_prologue()

    @phase("reduce")
    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        super().allreduce_gradients(*args, **kwargs)

    @phase("update")
    def apply_gradients(self, learning_rate: float) -> bool:
        """Reduce, finalise, clip, update; True if the update happened, False if the gradient was not finite or the
        finalizer's `refuse` said so.

        The decision is the same on every rank. Gradients are gone afterwards. `finalizer.norm` holds the global
        gradient norm of this step, before clipping and without loss scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        if self.zero_stage > 0:
            self._step_with_zero()
            return not self.optimizer.overflow
        self._running_engine_step = True
        self.allreduce_gradients()
        self._running_engine_step = False
        norm = self.finalizer.finalize(self._whole_gradients(), scale=1.0)
        applied = math.isfinite(norm) and not self.finalizer.is_refused
        if applied:
            self._clip(norm)
            self.optimizer.step()
        for parameter in self._trained():
            parameter.grad = None
        return applied

    def _step_with_zero(self) -> None:
        try:
            self.step()
        except Exception as error:  # DeepSpeed raises a bare Exception when fp16 runs out of scale
            if "minimum" in str(error) and "scale" in str(error):
                raise TrainingStopped(
                    "the fp16 loss scale fell to its minimum, optimizer.min_loss_scale "
                    f"{self.optimizer.loss_scaler.min_scale}, and gradients still overflow: lower optimizer.lr, "
                    "or use run.precision=bf16"
                ) from error
            raise

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _clip(self, norm: float) -> None:
        clip = self.finalizer.clip_grad
        if clip > 0.0 and norm > clip:
            for parameter in self._trained():
                parameter.grad.mul_(clip / (norm + 1e-6))

    def _whole_gradients(self) -> list[GradientSlice]:
        """Stage 0: every rank has every gradient of its parameters whole."""
        by_tensor = self.finalizer.by_tensor
        return [
            GradientSlice(by_tensor[id(parameter)], parameter.grad.view(-1), 0)
            for parameter in self._trained()
        ]

    def _partitioned_gradients(self) -> list[GradientSlice]:
        """Stages 1, 2: the slices of reduced gradients in this rank's partition of each optimizer group."""
        zero, found = self.optimizer, []
        for index in range(len(zero.bit16_groups)):
            partition = torch.distributed.get_rank(zero.real_dp_process_group[index])
            pieces = [p for p in zero.averaged_gradients[index] if not getattr(p, "_zero_padding", False)]
            # Where padding is not marked it comes last, after the pieces of all parameters.
            for parameter, piece in zip(zero.params_in_partition[index], pieces, strict=False):
                start = zero.grad_start_offset[index][partition][zero.get_param_id(parameter)]
                found.append(GradientSlice(self.finalizer.by_tensor[id(parameter)], piece.view(-1), int(start)))
        return found

    def _take_over_zero(self) -> None:
        """Put our finalising, norm and overflow verdict in the place of ZeRO's own.

        ZeRO's norm counts by optimizer group, which hangs when pipeline stages have unequal groups, and its overflow
        check is a further collective; ours does both in one pass. Clipping, skipping and loss scale stay ZeRO's.
        """
        zero = self.optimizer

        def check_overflow(partition_gradients: bool = True) -> None:
            norm = self.finalizer.finalize(self._partitioned_gradients(), scale=float(zero.loss_scale))
            zero.overflow = not math.isfinite(norm) or self.finalizer.is_refused

        def update_scale(has_overflow: bool = False) -> None:
            if not self.finalizer.is_refused or not math.isfinite(self.finalizer.norm):
                zero.loss_scaler.update_scale(has_overflow)  # a refused gradient says nothing about the scale

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            return torch.tensor(self.finalizer.norm * float(zero.loss_scale))

        zero.check_grad_overflow = True
        zero.check_overflow = check_overflow
        zero._update_scale = update_scale
        zero.scaled_global_norm = scaled_global_norm
        zero.reduce_ipg_grads = phase("reduce")(zero.reduce_ipg_grads)  # stage 2 calls it inside backward passes


def deepspeed_config(config: Config, data_parallel_size: int, num_local_elements: int) -> dict[str, Any]:
    """The DeepSpeed configuration; what the engines would corrupt is written out, never left to a default."""
    optimizer, precision = config.optimizer, config.run.precision
    bucket = reduce_bucket_elements(num_local_elements)
    settings: dict[str, Any] = {
        # DeepSpeed's counters of samples mean nothing here: the schedules count micro-batches.
        "train_batch_size": data_parallel_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.clip_grad,  # absent it would be 1.0
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,  # false averages different experts over the data-parallel group
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if precision == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": max(0, round(math.log2(optimizer.initial_loss_scale))),
            "loss_scale_window": optimizer.loss_scale_window_steps,
            "hysteresis": 1,
        }
    if precision != "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # Otherwise DeepSpeed rounds the fp32 sums to 16 bits and adds up the ranks' gradients in them.
        settings["communication_data_type"] = "fp32"
    return settings


def create_engine(
    chunks: Sequence[nn.Module],
    parameters: Sequence[LocalParameter],
    optimizer: torch.optim.Optimizer,
    config: Config,
    groups: ParallelGroups,
) -> ScheduleEngine:
    """Wrap the chunks and the optimizer over `parameters`, those that are trained.

    Raises ConfigError where the accelerator cannot do the precision.

    torch.distributed and the groups must exist. Broadcasts weights over the data-parallel groups.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    if config.run.precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"run.precision fp16 is not supported by this machine's {accelerator.device_name()} accelerator: "
            "use bf16 or fp32"
        )
    num_local = sum(local.tensor.numel() for local in parameters)
    settings = deepspeed_config(config, groups.grid.data, num_local)
    mpu = MpuAdapter(groups)
    engine = ScheduleEngine(
        args=None,
        model=nn.ModuleList(chunks),
        optimizer=optimizer,
        model_parameters=[local.tensor for local in parameters],
        mpu=mpu,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
    )
    engine.zero_stage = config.parallel.zero_stage
    engine.finalizer = GradientFinalizer(parameters, groups, config)
    if engine.zero_stage > 0:
        engine._take_over_zero()
    if config.run.precision == "fp16":
        # DeepSpeed takes powers of two and whole minima only.
        engine.optimizer.loss_scaler.cur_scale = config.optimizer.initial_loss_scale
        engine.optimizer.loss_scaler.min_scale = config.optimizer.min_loss_scale
    return engine
