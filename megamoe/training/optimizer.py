"""Parameter groups and the optimizer that DeepSpeed wraps."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.model.naming import LocalParameter
from megamoe.moe.layer import expert_group_name
from megamoe.topology.updates import UpdateKind, update_kind


def parameter_groups(parameters: Sequence[LocalParameter], config: Config) -> list[dict[str, Any]]:
    """Dense and expert parameters, each with and without weight decay, experts of each learning rate apart.

    DeepSpeed needs expert groups marked `moe` and named like their process group. `lr_scale` multiplies the schedule;
    it is the experts' own and differs among them only in a pyramid, under "inverse_sqrt_experts".
    """
    optimizer = config.optimizer
    members: dict[UpdateKind, list[torch.Tensor]] = {}
    for local in parameters:
        members.setdefault(update_kind(local.parameter, optimizer), []).append(local.tensor)
    name = expert_group_name(config.parallel.expert_parallel_size)
    return [
        {
            "params": members[kind],
            "weight_decay": 0.0 if kind.is_exempt else optimizer.weight_decay,
            "lr_scale": kind.lr_scale,
            "name": name if kind.is_expert else "dense",
            **({"moe": True} if kind.is_expert else {}),
        }
        for kind in sorted(members)
    ]


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
