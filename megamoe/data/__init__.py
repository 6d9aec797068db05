"""From text to batches: readers, tokenizers, indexed datasets, blends whose order no rank layout changes. No torch."""
