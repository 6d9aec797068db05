"""The real trainer of one rank on the meta device: every tensor has a shape and a type, none has memory.

`build_trainer` is called as training calls it, with another device. What the libraries hard-code for devices with
memory is bridged here, each with its reason; nothing of it outlives the context. torch 2.13, DeepSpeed 0.19.8,
Megatron-core 0.16.1.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.dry_run.accelerator import accelerator_without_memory
from megamoe.dry_run.fake_world import playing
from megamoe.model import cpu_bridge
from megamoe.training.build import Trainer, build_trainer
from megamoe.training.groups import destroy_groups

META = torch.device("meta")
Kernels = Literal["cuda", "cpu"]  # whose kernels' saved tensors are played


@contextmanager
def without_memory(kernels: Kernels = "cuda") -> Iterator[None]:
    """Inside, the device that the engines ask the machine for is the meta device, and what they do to it works."""
    cpu_bridge.apply()
    with ExitStack() as bridges:
        bridges.enter_context(accelerator_without_memory(META))
        # Megatron-core allocates what it receives on torch.cuda.current_device().
        bridges.enter_context(patch.object(torch.cuda, "current_device", lambda: META))
        # torch knows the shapes of its fused AdamW on the meta device, but asks a list of devices that lacks it.
        bridges.enter_context(patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]))
        bridges.enter_context(patch.object(F, "scaled_dot_product_attention", _flash_attention))
        if kernels == "cuda":
            bridges.enter_context(patch.object(F, "rms_norm", _fused_rms_norm))
        yield


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """On the meta device torch would choose its plain attention, whose [s, s] matrices no rank of a cluster keeps. This
    is the flash kernel that CPUs run; that of GPUs keeps the same, and it alone has dropout."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _FusedRmsNorm(torch.autograd.Function):
    """The shapes of torch's CUDA kernel: it keeps its input, its weight and one number a row (aten::_fused_rms_norm).
    On the meta device, as on CPUs, torch takes the norm apart into steps that keep several copies of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _fused_rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    return _FusedRmsNorm.apply(x, weight)


@contextmanager
def trainer_of_rank(config: Config, rank: int, world_size: int, *, kernels: Kernels = "cuda") -> Iterator[Trainer]:
    """The trainer that `rank` of `world_size` builds for `config`, in a fake world of its own, without memory.

    Raises what `build_trainer` raises where the layout does not fit the ranks.
    """
    with playing(rank, world_size), without_memory(kernels):
        trainer = None
        try:
            with META:  # parameters are made where tensors are made by default, and moved to their device afterwards
                trainer = build_trainer(config, META)
            yield trainer
        finally:  # the next rank to be played finds the engines as this one did, whatever happened
            if trainer is not None:
                trainer.close()
            destroy_groups()
            del trainer
