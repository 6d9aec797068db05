"""The transformer on Megatron-core: spec, embeddings, norms, attention, initial weights, global names, CPU bridge."""
