"""The shared expert: a dense FFN that every token passes beside its experts, and how the two outputs are joined.

    s sequence (a slice of it under sequence parallelism)   b micro-batch   h hidden   f FFN of the shared expert

n shared experts of FFN size f, as papers count them, are exactly one of size n * f: their outputs are summed, and the
rows of fc1 and columns of fc2 stand side by side.
"""

import copy
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

SharedExpertMix = Literal["add", "sigmoid_gate", "residual"]


class _Mixing(nn.Module):
    """A linear map to one score (weight [1, h]) or two (weight [2, h], bias [2]) per token, whole on every rank."""

    def __init__(self, config: TransformerConfig, num_scores: int, *, bias: bool) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        factory = {"dtype": config.params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty((num_scores, config.hidden_size), **factory))
        self.bias = nn.Parameter(torch.empty(num_scores, **factory)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [s, b, h] -> scores [s, b, 1 or 2] fp32; the product runs in the model's dtype."""
        return nn.functional.linear(hidden, self.weight, self.bias).float()


class SharedExpert(MLP):
    """Megatron's own FFN, cut over the tensor group like a dense layer's, with a size and a way to join of its own.

    With y the experts' output, s(x) the shared expert's, `mix` is
    - "add": y + s(x). DeepSeekMoE, Dai et al. (2024), eq. 9.
    - "sigmoid_gate": y + sigmoid(w x) s(x). Qwen2-MoE (Yang et al., 2024, and its released code).
    - "residual": c0 y + c1 s(x) with c = softmax(W x + b). Residual MoE of PR-MoE, Rajbhandari et al. (2022), section
      4.1, weighed as DeepSpeed's layer does.
    """

    def __init__(
        self, config: TransformerConfig, *, ffn_hidden_size: int, mix: SharedExpertMix, tensor_group: dist.ProcessGroup
    ) -> None:
        own = copy.copy(config)
        own.ffn_hidden_size = ffn_hidden_size  # MLP sizes fc2 by its configuration, whatever it is handed
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(own, submodules, ffn_hidden_size=ffn_hidden_size, tp_group=tensor_group)
        self.mixing = None
        if mix != "add":
            self.mixing = _Mixing(config, 2 if mix == "residual" else 1, bias=mix == "residual")

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [s, b, h] -> s(hidden), the same shape."""
        output, bias = super().forward(hidden)
        return output if bias is None else output + bias

    def mix(self, hidden: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        """The layer's output [s, b, h] from its input, the experts' output and this one's, all [s, b, h]."""
        if self.mixing is None:
            return routed + shared
        scores = self.mixing(hidden)
        if scores.shape[-1] == 1:
            return routed + scores.sigmoid().to(shared.dtype) * shared
        of_routed, of_shared = scores.softmax(dim=-1).to(shared.dtype).split(1, dim=-1)
        return of_routed * routed + of_shared * shared
