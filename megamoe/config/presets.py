"""Named configurations: the paper's ten models, modern mixtures of experts, and models for a laptop.

A preset holds what differs from the schema's defaults; `megamoe show NAME` prints it whole. Each is a starting point:
data, run folder and, for the large ones, the parallel layout are for the user to give.

Paper: "Efficient Large Scale Language Modeling with Mixtures of Experts", Artetxe et al., arXiv 2112.10684. Shapes and
optimiser settings are those of the published run configurations, at 2,048 tokens of context.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = Mapping[str, Mapping[str, Any]]

_M_TOKENS = 1024**2  # the "M" of the paper's batch sizes
_PAPER_TOKENS = 300_000_000_000
_PAPER_SEQ_LENGTH = 2048


@dataclass(frozen=True)
class Preset:
    """A name, a family (paper, modern, laptop), one line about it, and its settings by section."""

    name: str
    family: str
    summary: str
    tree: Tree


@dataclass(frozen=True)
class _PaperRun:
    """One row of the paper: the model, and how its run was laid out and optimised."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    batch_m_tokens: float
    num_gpus: int
    micro_batch_size: int
    lr: float
    warmup_steps: int
    dropout: float = 0.1
    weight_decay: float = 0.01
    num_experts: int = 0
    zero_stage: int = 1
    eval_fraction: float | None = None  # capacity in the published evaluations, as a share of the tokens


# The run of dense-125m had no fixed number of GPUs; 32 is that of the run that was evaluated, at another learning rate.
_PAPER_RUNS = (
    _PaperRun("dense-125m", 12, 768, 12, 0.5, 32, 4, 6e-4, 750),
    _PaperRun("dense-355m", 24, 1024, 16, 0.5, 64, 1, 3e-4, 715, dropout=0.0),
    _PaperRun("dense-1.3b", 24, 2048, 32, 1, 256, 2, 2e-4, 357),
    _PaperRun("dense-2.7b", 32, 2560, 32, 1, 128, 4, 1.6e-4, 357),
    _PaperRun("dense-6.7b", 32, 4096, 32, 2, 128, 8, 1.2e-4, 187),
    _PaperRun("dense-13b", 40, 5120, 40, 2, 256, 4, 1e-4, 187),
    _PaperRun("moe-15b", 12, 768, 12, 0.5, 64, 4, 6e-4, 750, num_experts=512, eval_fraction=0.25),
    _PaperRun("moe-52b", 24, 1024, 16, 0.5, 128, 2, 3e-4, 715, dropout=0.0, num_experts=512, eval_fraction=0.05),
    _PaperRun(
        "moe-207b", 24, 2048, 32, 1, 256, 2, 1.6e-4, 2000, weight_decay=0.0, num_experts=512, eval_fraction=0.05
    ),
    _PaperRun("moe-1.1t", 32, 4096, 32, 2, 256, 4, 1.2e-4, 187, num_experts=512, zero_stage=2, eval_fraction=0.046875),
)


def _paper_preset(run: _PaperRun) -> Preset:
    batch_tokens = round(run.batch_m_tokens * _M_TOKENS)
    batch_sequences = batch_tokens // _PAPER_SEQ_LENGTH
    accumulation = batch_sequences // (run.num_gpus * run.micro_batch_size)
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": run.num_layers,
            "hidden_size": run.hidden_size,
            "num_attention_heads": run.num_attention_heads,
            "vocab_size": 51_200,
            "seq_length": _PAPER_SEQ_LENGTH,
            "attention_dropout": run.dropout,
            "hidden_dropout": run.dropout,
        },
        "parallel": {"zero_stage": run.zero_stage, "recompute": "full"},
        "optimizer": {
            "lr": run.lr,
            "schedule": "linear",
            "warmup_steps": run.warmup_steps,
            "beta1": 0.9,
            "beta2": 0.98,
            "eps": 1e-8,
            "weight_decay": run.weight_decay,
            "clip_grad": 0.0,
            "initial_loss_scale": 4.0,
            # fairseq doubles the scale every 2^14 / GPUs / accumulation updates
            "loss_scale_window_steps": 2**14 // run.num_gpus // accumulation,
        },
        "run": {
            "num_steps": _PAPER_TOKENS // batch_tokens,
            "micro_batch_size": run.micro_batch_size,
            "global_batch_size": batch_sequences,
            "precision": "fp16",
            "eval_interval_steps": 1_000,
        },
    }
    summary = f"the paper's dense model, run on {run.num_gpus} GPUs"
    if run.num_experts:
        summary = f"the paper's mixture of experts, run on {run.num_gpus} GPUs"
        # capacity 2 * ceil(S / E): no slack, so the tokens of a rank's micro-batch are a hyper-parameter
        tree["moe"] = {
            "num_experts": run.num_experts,
            "top_k": 2,
            "layer_pattern": 2,
            "capacity_factor": 1.0,
            "eval_capacity_fraction": run.eval_fraction,
        }
        # tokens were exchanged among all GPUs of the run, min(GPUs, experts) of them
        tree["parallel"]["expert_parallel_size"] = min(run.num_gpus, run.num_experts)
        tree["optimizer"] |= {"expert_grad_scaling": "sqrt_world_size", "expert_grad_world_size": run.num_gpus}
    return Preset(run.name, "paper", summary, tree)


_MODERN_MODEL = {
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "use_bias": False,
    "tie_embeddings": False,
    "scale_embeddings": False,
    "init": "normal",
}
_MODERN_OPTIMIZER = {"schedule": "cosine", "beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0}


def _modern_preset(
    name: str, summary: str, model: Mapping[str, Any], moe: Mapping[str, Any], *, lr: float, published_loss_coeff: float
) -> Preset:
    """A published shape with a usual training recipe (those runs' own are published in part at most).

    `published_loss_coeff` weighs a balance loss averaged over layers in which each of a token's top_k choices counts
    whole (Hugging Face's `router_aux_loss_coef`); ours is a sum over layers in which they count 1 / top_k each.
    """
    return Preset(
        name,
        "modern",
        summary,
        {
            "model": {**_MODERN_MODEL, "seq_length": 4096, **model},
            "moe": {
                "layer_pattern": 1,
                "dropless": True,
                "balance_loss": "all_choices",
                "balance_loss_coeff": published_loss_coeff * moe["top_k"] / model["num_layers"],
                **moe,
            },
            "parallel": {"recompute": "full"},
            "optimizer": {**_MODERN_OPTIMIZER, "lr": lr, "min_lr": lr / 10, "warmup_steps": 2_000},
            "run": {"num_steps": 250_000, "global_batch_size": 1024, "precision": "bf16", "eval_interval_steps": 1_000},
        },
    )


_MODERN_PRESETS = (
    _modern_preset(
        "mixtral-8x7b",
        "the shape of Mixtral 8x7B",
        {
            "num_layers": 32,
            "hidden_size": 4096,
            "ffn_hidden_size": 14_336,
            "num_attention_heads": 32,
            "num_query_groups": 8,
            "vocab_size": 32_000,
            "rope_base": 1_000_000.0,
            "norm_epsilon": 1e-5,
        },
        {"num_experts": 8, "top_k": 2, "normalize_gates": True},
        lr=3e-4,
        published_loss_coeff=0.02,
    ),
    _modern_preset(
        "olmoe-1b-7b",
        "the shape of OLMoE 1B-7B",
        {
            "num_layers": 16,
            "hidden_size": 2048,
            "ffn_hidden_size": 1024,
            "num_attention_heads": 16,
            "vocab_size": 50_304,
            "rope_base": 10_000.0,
            "norm_epsilon": 1e-5,
            "qk_norm": "full",
        },
        {"num_experts": 64, "top_k": 8, "normalize_gates": False},
        lr=4e-4,
        # Its training code weighs the share of all choices by 0.01; in Hugging Face's counting that is 0.01 / top_k.
        published_loss_coeff=0.01 / 8,
    ),
    _modern_preset(
        "qwen3-30b-a3b",
        "the shape of Qwen3 30B-A3B",
        {
            "num_layers": 48,
            "hidden_size": 2048,
            "ffn_hidden_size": 6144,
            "num_attention_heads": 32,
            "num_query_groups": 4,
            "head_dim": 128,
            "vocab_size": 151_936,
            "rope_base": 1_000_000.0,
            "norm_epsilon": 1e-6,
            "qk_norm": "head",
        },
        {"num_experts": 128, "top_k": 8, "normalize_gates": True, "expert_ffn_hidden_size": 768},
        lr=3e-4,
        published_loss_coeff=0.001,
    ),
)

_LAPTOP_MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 8192,
    "seq_length": 256,
}
_LAPTOP_OPTIMIZER = {"lr": 1e-3, "min_lr": 1e-4, "schedule": "cosine", "warmup_steps": 50, "clip_grad": 1.0}
_LAPTOP_RUN = {"num_steps": 1_000, "micro_batch_size": 4, "global_batch_size": 16, "eval_interval_steps": 250}

_LAPTOP_PRESETS = (
    Preset(
        "laptop-dense",
        "laptop",
        "a small dense model of the paper's family, for one rank or a few",
        {"model": _LAPTOP_MODEL, "optimizer": _LAPTOP_OPTIMIZER, "run": _LAPTOP_RUN},
    ),
    Preset(
        "laptop-moe",
        "laptop",
        "a small mixture of experts of the paper's family, for one rank or a few",
        {
            "model": _LAPTOP_MODEL,
            "moe": {"num_experts": 8, "top_k": 2, "layer_pattern": 2},
            "optimizer": _LAPTOP_OPTIMIZER,
            "run": _LAPTOP_RUN,
        },
    ),
    Preset(
        "laptop-moe-modern",
        "laptop",
        "a small mixture of experts of the modern family, for one rank or a few",
        {
            "model": {**_MODERN_MODEL, **_LAPTOP_MODEL, "ffn_hidden_size": 512, "num_query_groups": 2},
            "moe": {
                "num_experts": 8,
                "top_k": 2,
                "layer_pattern": 1,
                "dropless": True,
                "balance_loss": "all_choices",
            },
            "optimizer": _LAPTOP_OPTIMIZER | {"beta2": 0.95, "weight_decay": 0.1},
            "run": _LAPTOP_RUN,
        },
    ),
    Preset(
        "quickstart",
        "laptop",
        "the quickstart's mixture of experts on 8 local ranks: tensor 2 x pipeline 2 x expert 2, ZeRO-1",
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 128,
                "num_attention_heads": 4,
                "vocab_size": 4096,
                "seq_length": 128,
            },
            "moe": {"num_experts": 8, "top_k": 2, "layer_pattern": 2},
            "parallel": {
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 2,
                "expert_parallel_size": 2,
                "zero_stage": 1,
            },
            "optimizer": _LAPTOP_OPTIMIZER | {"lr": 4e-3, "min_lr": 4e-4, "warmup_steps": 20},
            "run": {
                "dir": "runs/quickstart",
                "num_steps": 200,
                "micro_batch_size": 4,
                "global_batch_size": 16,
                "eval_interval_steps": 100,
            },
        },
    ),
)

PRESETS: Mapping[str, Preset] = {
    preset.name: preset for preset in (*map(_paper_preset, _PAPER_RUNS), *_MODERN_PRESETS, *_LAPTOP_PRESETS)
}
