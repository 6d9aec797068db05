"""Small stacked experts, and what one of them is in plain linear maps."""

import torch
import torch.nn.functional as F

from megamoe.moe.experts import StackedExperts

HIDDEN, FFN = 5, 7


def make_experts(num_experts: int, *, gated: bool = False, use_bias: bool = True, adds_fc2_bias: bool = True, **sizes):
    experts = StackedExperts(
        num_local_experts=num_experts,
        hidden_size=sizes.get("hidden", HIDDEN),
        ffn_hidden_size=sizes.get("ffn", FFN),
        activation="swiglu" if gated else "gelu",
        use_bias=use_bias,
        adds_fc2_bias=adds_fc2_bias,
        recompute_activation=sizes.get("recompute_activation", True),
        dtype=sizes.get("dtype", torch.float64),
        device="cpu",
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    return experts


def apply_expert(experts: StackedExperts, e: int, x: torch.Tensor) -> torch.Tensor:
    """One expert as plain linear maps."""
    tensors = (experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias)
    weight1, bias1, weight2, bias2 = (None if p is None else p[e] for p in tensors)
    if weight1.dim() == 3:
        gate = F.linear(x, weight1[0], None if bias1 is None else bias1[0])
        hidden = F.silu(gate) * F.linear(x, weight1[1], None if bias1 is None else bias1[1])
    else:
        hidden = F.gelu(F.linear(x, weight1, bias1))
    return F.linear(hidden, weight2, bias2 if experts.adds_fc2_bias else None)
