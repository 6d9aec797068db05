"""Parameter groups and the optimizer that DeepSpeed wraps."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch

from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.model.naming import LocalParameter
from megamoe.moe.layer import expert_group_name


def parameter_groups(parameters: Sequence[LocalParameter], config: Config) -> list[dict[str, Any]]:
    """Dense and expert parameters, each with and without weight decay; empty groups are left out.

    DeepSpeed needs expert groups marked `moe` and named like their process group. `lr_scale` multiplies the schedule.
    """
    optimizer, experts = config.optimizer, config.moe.num_experts
    expert_scale = optimizer.expert_lr_scale
    if expert_scale == "inverse_sqrt_experts":
        expert_scale = 1.0 / math.sqrt(max(1, experts))
    groups = []
    for is_expert in (False, True):
        for decays in (True, False):
            members = [
                local.tensor
                for local in parameters
                if (local.parameter.kind == "expert") == is_expert
                and (optimizer.decay_norms_and_biases or not local.parameter.is_bias_or_norm) == decays
            ]
            if not members:
                continue
            name = expert_group_name(config.parallel.expert_parallel_size) if is_expert else "dense"
            groups.append(
                {
                    "params": members,
                    "weight_decay": optimizer.weight_decay if decays else 0.0,
                    "lr_scale": float(expert_scale) if is_expert else 1.0,
                    "name": name,
                    **({"moe": True} if is_expert else {}),
                }
            )
    return groups


def nvidia_apex_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam, or None. The package named apex on PyPI is an unrelated web toolkit."""
    if importlib.util.find_spec("apex") is None:
        return None
    try:
        from apex.optimizers import FusedAdam
    except Exception:  # the other apex is old: its import can fail in any way, or end in a missing module
        return None
    return FusedAdam


def apex_state() -> str:
    """"absent", "unrelated" (a package named apex that is not NVIDIA's, or one built without CUDA) or "nvidia"."""
    if importlib.util.find_spec("apex") is None:
        return "absent"
    return "unrelated" if nvidia_apex_adam() is None else "nvidia"


def build_optimizer(parameters: Sequence[LocalParameter], config: Config) -> torch.optim.Optimizer:
    """The optimizer over this rank's parameters. Raises ConfigError where apex is asked for and is not NVIDIA's."""
    settings, groups = config.optimizer, parameter_groups(parameters, config)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    betas = (settings.beta1, settings.beta2)
    if settings.implementation != "torch" and torch.cuda.is_available():
        fused_adam = nvidia_apex_adam()
        if fused_adam is not None:
            return fused_adam(groups, lr=settings.lr, betas=betas, eps=settings.eps, adam_w_mode=True)
    if settings.implementation == "apex":
        raise ConfigError(
            f"optimizer.implementation is apex, but NVIDIA's apex cannot be used here (apex is {apex_state()}, CUDA is "
            f"{'available' if torch.cuda.is_available() else 'not available'}): build it from NVIDIA's repository, or "
            'use "auto" or "torch"'
        )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
