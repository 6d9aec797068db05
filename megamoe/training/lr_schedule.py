"""Learning rate as a function of the step, and nothing else: no state to save, no torch."""

import math

from megamoe.config.schema import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (the first is 1) in a run of `num_steps`.

    Linear warm-up from 0 reaches `lr` at step warmup_steps. Then: "linear" and "cosine" reach `min_lr` at decay_steps
    (default num_steps) and stay there; "wsd" (warm-up, stable, decay) holds `lr` and falls linearly to `min_lr` over
    the last wsd_decay_steps (default a tenth) of num_steps; "constant" holds `lr`.
    """
    peak, lowest, warmup = optimizer.lr, optimizer.min_lr, optimizer.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if optimizer.schedule == "constant":
        return peak
    if optimizer.schedule == "wsd":
        end, length = num_steps, optimizer.wsd_decay_steps or max(1, num_steps // 10)
        start = max(warmup, end - length)
    else:
        end, start = optimizer.decay_steps or num_steps, warmup
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / max(1, end - start))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if optimizer.schedule == "cosine" else 1.0 - progress
    return lowest + (peak - lowest) * remaining
