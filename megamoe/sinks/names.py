"""What a tracking service calls the metrics of a run: in groups by prefix, with units. One table for all services."""

import re
from typing import NamedTuple

STEP = "step"


class Name(NamedTuple):
    """A metric's name, and which of its values stands for the whole run."""

    name: str
    summary: str = "last"  # or min, max, mean


_NAMES = {
    "step": Name(STEP, "max"),
    "loss": Name("train/loss", "min"),
    "lm_loss": Name("train/lm_loss", "min"),
    "perplexity": Name("train/perplexity", "min"),
    "lr": Name("train/learning_rate"),
    "grad_norm": Name("train/grad_norm"),
    "loss_scale": Name("train/loss_scale"),
    "num_nonfinite_values": Name("train/num_nonfinite_values", "max"),
    "skipped_steps": Name("train/skipped_steps", "max"),
    "spikes": Name("train/spikes", "max"),
    "rolled_back_steps": Name("train/rolled_back_steps", "max"),
    "global_batch_size": Name("train/global_batch_size_sequences"),
    "samples": Name("progress/sequences", "max"),
    "tokens": Name("progress/tokens", "max"),
    "valid_loss": Name("valid/loss", "min"),
    "valid_perplexity": Name("valid/perplexity", "min"),
    "test_loss": Name("test/loss", "min"),
    "test_perplexity": Name("test/perplexity", "min"),
    "tokens_per_second": Name("throughput/tokens_per_second", "mean"),
    "tokens_per_second_per_rank": Name("throughput/tokens_per_second_per_rank", "mean"),
    "model_flops_per_second": Name("throughput/model_flops_per_second", "mean"),
    "hardware_flops_per_second": Name("throughput/hardware_flops_per_second", "mean"),
    "flops_utilization": Name("throughput/flops_utilization", "mean"),
    "step_seconds": Name("time/step_seconds", "mean"),
    "memory_bytes": Name("memory/peak_bytes", "max"),
    "aux_loss": Name("moe/balance_loss"),
    "z_loss": Name("moe/z_loss"),
    "dropped_fraction": Name("moe/dropped_fraction", "mean"),
    "dropped_first_fraction": Name("moe/dropped_first_choice_fraction", "mean"),
    "dropped_second_fraction": Name("moe/dropped_second_choice_fraction", "mean"),
    "expert_load_max_over_mean": Name("moe/load_max_over_mean"),
    "expert_load_entropy": Name("moe/load_entropy"),
    "expert_load_top_fifth": Name("moe/load_top_fifth_fraction"),
    "expert_load_bottom_fifth": Name("moe/load_bottom_fifth_fraction"),
    "unused_experts": Name("moe/unused_experts"),
    "dead_experts": Name("moe/dead_experts"),
    "router_logit_rms": Name("moe/router_logit_rms"),
}
_PATTERNS = (
    (re.compile(r"seconds_(\w+)"), r"time/\1_seconds", "mean"),
    (re.compile(r"(valid|test)_(loss|perplexity)/(.+)"), r"\1/\2/\3", "min"),
)


def name_of(key: str) -> Name:
    """The name of a key of metrics.jsonl; what nobody has foreseen is in the group "other"."""
    if key in _NAMES:
        return _NAMES[key]
    for pattern, name, summary in _PATTERNS:
        if pattern.fullmatch(key):
            return Name(pattern.sub(name, key), summary)
    return Name(f"other/{key}")


def load_name(layer: int) -> str:
    """A layer's tokens by expert: a picture of experts over steps."""
    return f"moe_load/layer_{layer:03}"


def load_peak_name(layer: int) -> str:
    """Load of a layer's fullest expert over the mean."""
    return f"moe_layers/load_max_over_mean_{layer:03}"
