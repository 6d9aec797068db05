"""Models that only compute: weights of a checkpoint under any layout, no engine, no optimizer, no gradients."""
