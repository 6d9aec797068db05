"""What the MoE layer's products are computed in on processors without 16-bit instructions."""

from functools import cache

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of tensors like `x` are computed in: fp32 for 16-bit types that this processor has no instructions
    for, where widening the operands is up to a hundred times as fast."""
    return torch.float32 if x.device.type == "cpu" and _is_slow_on_cpu(x.dtype) else x.dtype


@cache
def _is_slow_on_cpu(dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype is torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False
