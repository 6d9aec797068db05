"""From our configuration to Megatron-core's TransformerConfig: only what the model and the schedules read."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.topology.parameters import dimensions

PRECISION_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DENSE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,  # of the gate half; the linear half multiplies it
}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's view of the model, the layout and the precision. Experts are ours: it is told of none."""
    model, parallel = config.model, config.parallel
    sizes = dimensions(model, config.moe)
    dtype = PRECISION_DTYPE[config.run.precision]
    on_cpu = not torch.cuda.is_available()
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[parallel.recompute]
    virtual = parallel.virtual_pipeline_parallel_size
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.query_groups,
        kv_channels=sizes.head_dim,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.normalization],
        layernorm_epsilon=model.norm_epsilon,
        activation_func=_DENSE_ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.use_bias,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # Weights are filled in by global name afterwards: see megamoe.model.init.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        # gloo sends one tensor at a time; NCCL batches both directions.
        batch_p2p_comm=not on_cpu,
        deallocate_pipeline_outputs=True,
        # The fused kernels are CUDA extensions, or compiled for CUDA.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recompute,
    )
