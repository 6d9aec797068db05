"""A job folded down to a few ranks and tiny widths: the same grid in kind, with every degree at its smallest. No torch.

What is more than one stays more than one as far as the ranks go: groups, schedules and exchanges are of the same kinds.
"""

from dataclasses import dataclass
from typing import Any

from megamoe.config.schema import Config
from megamoe.config.validation import validate

_HEAD_DIM, _FFN, _SEQ_LENGTH, _VOCAB = 8, 64, 32, 256
_MOST_LAYERS = 16


@dataclass(frozen=True)
class Folded:
    """The tiny job. `notes` say what is other than in the whole one, a line each."""

    config: Config
    world_size: int
    notes: tuple[str, ...]


def fold_down(config: Config, max_ranks: int) -> Folded:
    """The job of `config` on at most `max_ranks` ranks, down to 1. Raises ConfigError where what is left of it cannot
    be trained.

    Sizes are cut in this order until the ranks are enough: copies of the experts, expert, tensor and pipeline sizes.
    """
    for copies, expert, tensor, pipeline in ((2, 4, 2, 2), (2, 2, 2, 2), (1, 4, 2, 2), (1, 2, 2, 2), (1, 2, 1, 2),
                                             (1, 2, 1, 1), (1, 1, 1, 1)):  # fmt: skip
        world_size, tiny = _sized(config, copies, expert, tensor, pipeline)
        if world_size <= max_ranks:
            break
    validate(tiny, world_size)
    return Folded(tiny, world_size, tuple(_notes(config, tiny)))


def _sized(config: Config, copies: int, expert: int, tensor: int, pipeline: int) -> tuple[int, Config]:
    parallel = config.parallel
    tensor = min(tensor, parallel.tensor_parallel_size)
    pipeline = min(pipeline, parallel.pipeline_parallel_size)
    expert = min(expert, parallel.expert_parallel_size)
    expert_tensor = tensor if parallel.expert_tensor_parallel_size > 1 else 1
    stage_ranks = max(tensor, expert * expert_tensor)
    stage_ranks *= copies if stage_ranks % tensor == 0 else tensor * copies
    virtual = min(2, parallel.virtual_pipeline_parallel_size)
    hierarchical = parallel.all_to_all == "hierarchical" and expert == 4
    sizes: dict[str, Any] = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "virtual_pipeline_parallel_size": virtual if pipeline > 1 else 1,
        "expert_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
        "sequence_parallel": parallel.sequence_parallel and tensor > 1,
        "all_to_all": "hierarchical" if hierarchical else "flat",
        "ranks_per_node": 2 * expert_tensor if hierarchical else None,
        "all_to_all_chunks": min(2, parallel.all_to_all_chunks),
        "timeout_seconds": 60.0,
    }
    data = stage_ranks // tensor
    num_chunks = pipeline * sizes["virtual_pipeline_parallel_size"]
    run = {
        "micro_batch_size": 1,
        "global_batch_size": 2 * data * pipeline,
        "batch_size_ramp": None,
        "precision": "bf16" if config.run.precision == "fp16" else config.run.precision,
        "device": "cpu",
    }
    return stage_ranks * pipeline, config.model_copy(
        update={
            "model": config.model.model_copy(update=_model(config, num_chunks)),
            "moe": config.moe.model_copy(update=_experts(config, num_chunks, 2 * expert)),
            "parallel": parallel.model_copy(update=sizes),
            "run": config.run.model_copy(update=run),
        }
    )


def _model(config: Config, num_chunks: int) -> dict[str, Any]:
    heads = 4
    groups = config.model.num_query_groups
    return {
        "num_layers": _num_layers(config, num_chunks),
        "hidden_size": heads * _HEAD_DIM,
        "ffn_hidden_size": _FFN,
        "num_attention_heads": heads,
        "num_query_groups": None if groups is None or groups == config.model.num_attention_heads else 2,
        "head_dim": None if config.model.head_dim is None else _HEAD_DIM,
        "vocab_size": _VOCAB,
        "seq_length": _SEQ_LENGTH,
    }


def _num_layers(config: Config, num_chunks: int) -> int:
    """As many in each chunk as the pattern of experts is long, so that chunks are as unlike as they were."""
    pattern = config.moe.layer_pattern
    period = pattern if isinstance(pattern, int) and config.moe.num_experts else 2
    per_chunk = config.model.num_layers // (
        config.parallel.pipeline_parallel_size * config.parallel.virtual_pipeline_parallel_size
    )
    in_chunk = max(1, min(period, per_chunk, _MOST_LAYERS // num_chunks))
    while num_chunks * in_chunk < period:  # some layer must have experts
        in_chunk += 1
    return num_chunks * in_chunk


def _experts(config: Config, num_chunks: int, num_experts: int) -> dict[str, Any]:
    """Two experts a rank; a list of layers becomes every second one, a pyramid one size."""
    moe = config.moe
    if moe.num_experts == 0:
        return {}
    # A rank has at least as many as chunks of its experts and choices of a token need.
    while num_experts < 2 * min(moe.top_k, 4):
        num_experts *= 2
    grouped = moe.num_expert_groups is not None
    return {
        "num_experts": num_experts,
        "num_experts_by_layer": None,
        "top_k": min(moe.top_k, 4),
        "layer_pattern": moe.layer_pattern if isinstance(moe.layer_pattern, int) else 2,
        "expert_ffn_hidden_size": None if moe.expert_ffn_hidden_size is None else _FFN // 2,
        "shared_expert_ffn_hidden_size": None if moe.shared_expert_ffn_hidden_size is None else _FFN // 2,
        "num_expert_groups": 2 if grouped else None,
        "num_selected_groups": 1 if grouped else None,
    }


def _notes(config: Config, tiny: Config) -> list[str]:
    """What the rehearsal is not."""
    notes = []
    for key, value in config.parallel.model_dump().items():
        other = getattr(tiny.parallel, key)
        if value != other and key not in ("timeout_seconds", "ranks_per_node"):
            notes.append(f"parallel.{key} {value} -> {other}")
    for section, keys in (("model", ("num_layers", "hidden_size", "seq_length")), ("moe", ("num_experts", "top_k")),
                          ("run", ("precision", "micro_batch_size", "global_batch_size"))):  # fmt: skip
        for key in keys:
            value, other = getattr(getattr(config, section), key), getattr(getattr(tiny, section), key)
            if value != other:
                notes.append(f"{section}.{key} {value} -> {other}")
    return notes
