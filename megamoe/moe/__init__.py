"""The mixture-of-experts layer: router, dispatch, experts, balance loss, load statistics.

Everything but `layer` is plain torch and takes what it needs as arguments; `layer` fits the parts into
Megatron-core's transformer layer and makes DeepSpeed see an MoE layer.
"""
