"""Random valid configurations of tiny models on up to 8 ranks, for tests that hold plans to real runs."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.errors import MegamoeError
from megamoe.topology.grid import Grid
from megamoe.topology.nodes import exchange_levels


def random_configs(seed: int, world_size: int, count: int, **fixed: Any) -> list[Config]:
    """`count` configurations that the validation takes on `world_size` ranks. `fixed`: "section__key" -> value."""
    draw, found = random.Random(f"{seed}/{world_size}"), []
    while len(found) < count:
        tree = _tree(draw, world_size)
        for key, value in fixed.items():
            section, name = key.split("__")
            tree.setdefault(section, {})[name] = value
        try:
            config = Config.model_validate(tree)
            validate(config, world_size)
            grid = Grid.from_config(config.parallel, world_size)
            if config.parallel.all_to_all == "hierarchical":
                exchange_levels(grid.expert_groups(), config.parallel.ranks_per_node)
        except (MegamoeError, ValueError):
            continue
        found.append(config)
    return found


def _tree(draw: random.Random, world_size: int) -> dict[str, dict[str, Any]]:
    tensor, pipeline, data = draw.choice(list(_folds(world_size)))
    has_experts = draw.random() < 0.75
    model = _model(draw)
    moe = _moe(draw, model) if has_experts else {"num_experts": 0}
    num_micro_batches = draw.choice((1, 2, 2, 3, 4))
    micro_batch_size = draw.choice((1, 2))
    precision = draw.choice(("fp32", "bf16"))
    return {
        "model": model,
        "moe": moe,
        "parallel": {
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
            "virtual_pipeline_parallel_size": draw.choice((1, 2)) if pipeline > 1 else 1,
            "expert_parallel_size": draw.choice((1, 2, 4, 8)) if has_experts else 1,
            "expert_tensor_parallel_size": draw.choice((1, tensor)) if has_experts else 1,
            "sequence_parallel": tensor > 1 and draw.random() < 0.5,
            "all_to_all": draw.choice(("flat", "flat", "hierarchical")) if has_experts else "flat",
            "all_to_all_chunks": draw.choice((1, 1, 2)) if has_experts else 1,
            "ranks_per_node": draw.choice((1, 2, 4)),
            "zero_stage": draw.choice((0, 1, 1, 2) if precision == "fp32" else (1, 1, 2)),
            "recompute": draw.choice(("none", "none", "selective", "full")),
            "timeout_seconds": 60,
        },
        "optimizer": {
            **draw.choice(({"name": "adamw"}, {"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.9})),
            "decay_norms_and_biases": draw.random() < 0.5,
            "expert_lr_scale": draw.choice((1.0, 0.5, "inverse_sqrt_experts")),
            "clip_grad": draw.choice((0.0, 1.0)),
        },
        "run": {
            "precision": precision,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": micro_batch_size * data * num_micro_batches,
        },
    }


def _folds(world_size: int) -> Iterator[tuple[int, int, int]]:
    """(tensor, pipeline, data) of a world whose size is a power of two."""
    for tensor_log in range(int(math.log2(world_size)) + 1):
        for pipeline_log in range(int(math.log2(world_size)) + 1 - tensor_log):
            yield 2**tensor_log, 2**pipeline_log, world_size // 2 ** (tensor_log + pipeline_log)


def _model(draw: random.Random) -> dict[str, Any]:
    head_dim = draw.choice((4, 6, 8))
    heads = draw.choice((4, 8))
    return {
        "num_layers": draw.choice((2, 2, 4, 4, 4, 8)),
        "hidden_size": draw.choice((20, 24, 25, 36)),
        "ffn_hidden_size": draw.choice((24, 40, 56)),
        "num_attention_heads": heads,
        "num_query_groups": draw.choice((None, heads // 2)),
        "head_dim": head_dim,
        "vocab_size": draw.choice((100, 128, 250)),
        "vocab_size_multiple": draw.choice((8, 128)),
        "seq_length": draw.choice((8, 16)),
        "normalization": draw.choice(("layernorm", "rmsnorm")),
        "activation": draw.choice(("gelu", "gelu_tanh", "swiglu")),
        "position_embedding": draw.choice(("sinusoidal", "rope")),
        "qk_norm": draw.choice(("none", "none", "head", "full")),
        "use_bias": draw.random() < 0.5,
        "tie_embeddings": draw.random() < 0.5,
        "scale_embeddings": draw.random() < 0.5,
        "attention_dropout": draw.choice((0.0, 0.0, 0.1)),
        "hidden_dropout": draw.choice((0.0, 0.0, 0.1)),
    }


def _moe(draw: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    pattern: int | Sequence[int] = draw.choice((1, 2, 2, [model["num_layers"] - 1], [0, 1]))
    num_layers = model["num_layers"] // pattern if isinstance(pattern, int) else len(pattern)
    counts = [draw.choice((2, 4, 8)) for _ in range(num_layers)] if draw.random() < 0.3 else None
    top_k = draw.choice((1, 2, 2, 3, 4))
    sigmoid = draw.random() < 0.3
    return {
        "num_experts": max(counts) if counts else draw.choice((2, 4, 8)),
        "num_experts_by_layer": counts,
        "top_k": top_k,
        "layer_pattern": pattern,
        "expert_ffn_hidden_size": draw.choice((None, 24, 32)),
        **draw.choice(
            (
                {},
                {},
                {"shared_expert_ffn_hidden_size": 16, "shared_expert_mix": draw.choice(("add", "sigmoid_gate"))},
                {"shared_expert_ffn_hidden_size": 24, "shared_expert_mix": "residual"},
            )
        ),
        "recompute_activation": draw.random() < 0.5,
        "dropless": draw.random() < 0.5,
        "capacity_factor": draw.choice((0.5, 1.0, 2.0)),
        "score_function": "sigmoid" if sigmoid else "softmax",
        "gate_order": "softmax_then_select" if sigmoid or top_k == 1 else draw.choice(
            ("softmax_then_select", "select_then_softmax")
        ),
        "normalize_gates": top_k > 1 and draw.random() < 0.6,
        "balance_bias_update_rate": 0.01 if sigmoid and draw.random() < 0.7 else 0.0,
        "balance_loss": draw.choice(("first_choice", "all_choices")),
        "balance_loss_scope": draw.choice(("micro_batch", "sequence", "global_batch")),
        "balance_loss_coeff": draw.choice((0.0, 0.01)),
        "z_loss_coeff": draw.choice((0.0, 0.01)),
        "input_jitter": draw.choice((0.0, 0.0, 0.1)),
    }  # fmt: skip
