"""Losses that keep the experts evenly loaded, and how they reach the gradient from inside a pipeline stage."""

from typing import Any, Literal

import torch
from torch import Tensor

from megamoe.moe.routing import count_experts

BalanceKind = Literal["first_choice", "all_choices"]


def choice_share(expert_index: Tensor, num_experts: int, kind: BalanceKind, *, num_sequences: int = 1) -> Tensor:
    """Share [E] of the tokens' choices [S, k] that fell on each expert, before dropping: first choices, or all.

    With `num_sequences` b, token t is of sequence t % b, and the result [b * E] holds the shares of one after another.
    """
    counted = expert_index[:, :1] if kind == "first_choice" else expert_index
    if num_sequences > 1:
        sequence = torch.arange(counted.shape[0], device=counted.device).remainder_(num_sequences)
        counted = counted + num_experts * sequence.unsqueeze(1)
    return count_experts(counted, num_sequences * num_experts) / max(1, counted.numel() // num_sequences)


def balance_loss(
    probabilities: Tensor,
    expert_index: Tensor,
    kind: BalanceKind,
    *,
    share: Tensor | None = None,
    num_sequences: int = 1,
) -> Tensor:
    """E * sum_e m_e * c_e, a scalar that is 1 when the load is even.

    m_e is the mean probability of expert e over the S tokens of `probabilities` [S, E]; c_e the share of choices it
    got (`expert_index` [S, k]): first choices only as in GShard and Artetxe et al. (2021), or all of them as in
    Switch and Hugging Face. `share` [E] overrides c, where the tokens are one slice of a larger set whose choices
    were counted together: the mean of the slices' losses is then the loss of the set, as it is linear in m. That set
    is the micro-batch (tensor slices), or with global scope the micro-batches of all data ranks (Qiu et al., 2025,
    "Demons in the Detail"). `num_sequences` b: the mean of the losses of b sequences, each balanced in itself
    (DeepSeek-V3, eq. 17-20), tokens and share laid out as in `choice_share`.
    """
    num_experts = probabilities.shape[1]
    if share is None:
        share = choice_share(expert_index, num_experts, kind, num_sequences=num_sequences)
    mean = probabilities.unflatten(0, (-1, num_sequences)).mean(dim=0).reshape(-1)
    return num_experts * (mean * share).sum() / num_sequences


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (log sum_e exp z_e)^2, logits z [S, E]: keeps router logits small (ST-MoE, 2022, eq. 5)."""
    return logits.logsumexp(dim=-1).square().mean()


class LossScale:
    """What auxiliary losses are multiplied by in the backward pass: loss scale / micro-batches per step.

    One instance is shared by the training step, which sets `value` before each schedule, and the MoE layers.
    """

    def __init__(self) -> None:
        self.value: float = 1.0


class _AttachLoss(torch.autograd.Function):
    """Pass `output` through; in the backward pass start the gradient of `loss` with `scale`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: LossScale, weight: float) -> Tensor:
        ctx.scale, ctx.weight = scale, weight
        ctx.loss_shape, ctx.loss_dtype = loss.shape, loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient = torch.full(
            ctx.loss_shape, ctx.weight * ctx.scale.value, dtype=ctx.loss_dtype, device=grad_output.device
        )
        return grad_output, gradient, None, None


def attach_loss(output: Tensor, loss: Tensor, scale: LossScale, weight: float) -> Tensor:
    """Return `output` unchanged, tied to `loss` so that its gradient, times weight * scale, joins the backward pass.

    A pipeline stage hands only activations to the next one, so a loss made inside a stage cannot travel to the
    last stage's sum; its gradient can start where the loss was made.
    """
    return _AttachLoss.apply(output, loss, scale, weight)
