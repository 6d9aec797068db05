"""The parity grid as data: which layouts must train exactly as one plain process does.

How the layouts were chosen. A layout is a row of levels, one per factor: tensor 1-2, pipeline 1-4, virtual stages
1-2, experts 1-8, expert tensor 1-2, data 1-4, ZeRO 0-2, sequence parallelism, recompute, where the MoE layers are,
tied or untied head, dropless or capacity, clipping, expert gradient scaling, family. Most faults of such a stack
lie where two of these meet (a tied head and pipeline stages; clipping and experts under tensor parallelism; ZeRO
and a stage without MoE), so every pair of levels that up to 8 ranks allow occurs in at least one layout;
`test_layouts.py` counts them. Threes and fours that have failed elsewhere were added by hand: interleaved stages
with capacity and sequence parallelism, clipping with sqrt-scaled experts under tensor parallelism, fewer
micro-batches than stages, a padded vocabulary, experts shared between tensor peers, one micro-batch per step.

A launch of one world size can run all its layouts one after another; those of one model sit next to each other.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import yaml

from megamoe.config.schema import Config

NUM_STEPS = 5

_BASE = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.vocab_size=128",
    "model.seq_length=16",
    "moe.num_experts=4",
    "moe.dropless=true",
    "moe.balance_loss_coeff=0.1",  # so large that its gradient shows
    "run.micro_batch_size=2",
    "run.global_batch_size=8",
    f"run.num_steps={NUM_STEPS}",
    "run.precision=fp32",
    "run.seed=1234",
    "parallel.timeout_seconds=60",
)
_MODERN = (
    *_BASE,
    "model.normalization=rmsnorm",
    "model.activation=swiglu",
    "model.position_embedding=rope",
    "model.num_query_groups=2",
    "model.qk_norm=head",
    "model.use_bias=false",
    "model.tie_embeddings=false",
    "model.scale_embeddings=false",
    "model.init=normal",
    "model.init_std=0.15",
    "moe.balance_loss=all_choices",
)
_CAPACITY = ("moe.dropless=false",)
_BIAS = ("moe.score_function=sigmoid", "moe.balance_bias_update_rate=0.01")
_SHARED = ("moe.shared_expert_ffn_hidden_size=48",)
_RESIDUAL = ("moe.shared_expert_mix=residual",)
_GROUPS = ("moe.num_expert_groups=4", "moe.num_selected_groups=2")

MODELS: dict[str, tuple[str, ...]] = {
    "paper": _BASE,
    "paper_untied": (*_BASE, "model.tie_embeddings=false"),
    "paper_all": (*_BASE, "moe.num_experts=8", "moe.layer_pattern=1"),
    "paper_late": (*_BASE, "moe.layer_pattern=[3]"),  # only the last stage has an MoE layer
    "paper_dense": (*_BASE, "moe.num_experts=0", "model.vocab_size=121"),  # 7 padded rows take part in the softmax
    "paper_deep": (*_BASE, "model.num_layers=8"),
    "paper_capacity": (*_BASE, *_CAPACITY),
    "paper_all_capacity": (*_BASE, *_CAPACITY, "moe.num_experts=8", "moe.layer_pattern=1"),
    "paper_late_capacity": (*_BASE, *_CAPACITY, "moe.layer_pattern=[2,3]"),
    "modern": (*_MODERN, "moe.layer_pattern=1", "moe.num_experts=8"),
    "modern_second": _MODERN,
    "modern_tied": (*_MODERN, "moe.layer_pattern=1", "model.tie_embeddings=true"),
    "modern_late": (*_MODERN, "moe.layer_pattern=[2,3]"),
    "modern_dense": (*_MODERN, "moe.num_experts=0"),
    "modern_capacity": (*_MODERN, *_CAPACITY, "moe.layer_pattern=1", "moe.capacity_factor=0.75"),
    # OLMoE's choices: one norm over all heads, three experts, gates as they are.
    "modern_full_norm": (
        *_MODERN,
        "model.qk_norm=full",
        "moe.num_experts=8",
        "moe.top_k=3",
        "moe.normalize_gates=false",
    ),
    # The other routers and losses.
    "switch_capacity": (*_BASE, *_CAPACITY, "moe.num_experts=8", "moe.top_k=1", "moe.normalize_gates=false"),
    "top4": (*_MODERN, "moe.num_experts=8", "moe.top_k=4", "moe.balance_loss_scope=sequence"),
    "top8": (*_MODERN, "moe.num_experts=16", "moe.top_k=8", "moe.gate_order=select_then_softmax"),
    "bias": (*_MODERN, *_BIAS, "moe.num_experts=8", "moe.layer_pattern=1", "moe.routed_scaling_factor=1.5"),
    "grouped_bias": (*_MODERN, *_BIAS, *_GROUPS, "moe.num_experts=8", "moe.balance_loss_scope=sequence"),
    "grouped": (*_BASE, *_GROUPS, "moe.num_experts=8", "moe.z_loss_coeff=0.02"),
    "probability_capacity": (
        *_BASE,
        *_CAPACITY,
        "moe.drop_policy=probability",
        "moe.normalize_when=before_drops",
        "moe.z_loss_coeff=0.02",
    ),
    "global": (*_MODERN, "moe.num_experts=8", "moe.balance_loss_scope=global_batch"),
    # A dense FFN beside the experts, and a different number of experts in each layer.
    "shared": (*_MODERN, "moe.layer_pattern=1", *_SHARED),
    "shared_gate": (*_MODERN, "moe.num_experts=8", *_SHARED, "moe.shared_expert_mix=sigmoid_gate"),
    "residual": (*_BASE, *_SHARED, *_RESIDUAL),
    "pyramid": (*_MODERN, *_BIAS, "moe.layer_pattern=1", "moe.num_experts=8", "moe.num_experts_by_layer=[2,4,4,8]"),
    # PR-MoE: one expert each beside the shared one, more experts where they tell more.
    "residual_pyramid_capacity": (
        *_BASE,
        *_SHARED,
        *_RESIDUAL,
        *_CAPACITY,
        "moe.num_experts=8",
        "moe.num_experts_by_layer=[4,8]",
        "moe.top_k=1",
        "moe.normalize_gates=false",
    ),
}

# SGD shows a wrong gradient scale at once; AdamW hides it, but shows wrong moments, decay groups and rates. Its eps is
# large on purpose: at 1e-8, rounding errors of vanishing gradients come out as whole steps of size lr.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "sgd": ("optimizer.name=sgd", "optimizer.lr=0.5", "optimizer.weight_decay=0", "optimizer.schedule=constant"),
    "adamw": (
        "optimizer.name=adamw",
        "optimizer.lr=0.005",
        "optimizer.eps=0.001",
        "optimizer.weight_decay=0.1",
        "optimizer.schedule=linear",
        "optimizer.warmup_steps=2",
        "optimizer.min_lr=0.001",
    ),
}


@dataclass(frozen=True)
class ParityLayout:
    """One row of the grid: `world` ranks train `model` under `overrides` ("section.key=value", after the model's)."""

    name: str
    world: int
    model: str
    overrides: tuple[str, ...]

    def settings(self, optimizer: str) -> list[str]:
        """All overrides in the order they apply; `optimizer` is a key of OPTIMIZERS."""
        return [*MODELS[self.model], *OPTIMIZERS[optimizer], *self.overrides]

    def config(self, optimizer: str) -> Config:
        """The configuration, read by the schema alone."""
        tree: dict[str, dict] = {}
        for setting in self.settings(optimizer):
            path, text = setting.split("=", 1)
            section, key = path.split(".")
            tree.setdefault(section, {})[key] = yaml.safe_load(text)
        return Config.model_validate(tree)


_SHORT = {
    "tp": "parallel.tensor_parallel_size",
    "pp": "parallel.pipeline_parallel_size",
    "vp": "parallel.virtual_pipeline_parallel_size",
    "ep": "parallel.expert_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "zero": "parallel.zero_stage",
    "sp": "parallel.sequence_parallel",
    "a2a": "parallel.all_to_all",
    "chunks": "parallel.all_to_all_chunks",
    "node": "parallel.ranks_per_node",
    "recompute": "parallel.recompute",
    "clip": "optimizer.clip_grad",
    "scaling": "optimizer.expert_grad_scaling",
    "sharing": "optimizer.expert_grad_world_size",
    "expert_lr": "optimizer.expert_lr_scale",
    "all_decay": "optimizer.decay_norms_and_biases",
    "batch": "run.global_batch_size",
}


def _layout(world: int, model: str, text: str) -> ParityLayout:
    """A layout from short keys, e.g. "tp2 pp2 sp clip=0.05": a number may follow its key, a lone word means true."""
    overrides = []
    for word in text.split():
        key, _, value = word.partition("=")
        if not value:
            key = word.rstrip("0123456789")
            value = word[len(key) :] or "true"
        overrides.append(f"{_SHORT[key]}={value}")
    return ParityLayout(f"w{world}-{model}-{text.replace(' ', '-')}", world, model, tuple(overrides))


_SQRT = "scaling=sqrt_world_size"

LAYOUTS: tuple[ParityLayout, ...] = (
    # one rank: the model itself, and that size 1 takes the same path
    _layout(1, "paper", "zero0"),
    _layout(1, "paper_capacity", "zero1 clip=0.5 recompute=full batch=12"),
    _layout(1, "modern", "zero2 recompute=selective"),
    _layout(1, "modern_full_norm", "zero1 all_decay=false"),
    # two ranks: one kind of parallelism at a time
    _layout(2, "paper", "ep1 zero0"),
    _layout(2, "paper", "tp2 zero0 clip=0.5"),
    _layout(2, "paper_capacity", "ep2 zero1 expert_lr=inverse_sqrt_experts"),
    _layout(2, "paper_capacity", "tp2 ep2 sp zero1 clip=0.5"),
    _layout(2, "paper_late", "pp2 zero1 clip=0.5"),
    _layout(2, "paper_dense", "tp2 sp zero0"),
    _layout(2, "modern", "tp2 etp2 sp zero1"),
    _layout(2, "modern_second", f"ep2 zero2 clip=0.5 {_SQRT} sharing=4"),
    _layout(2, "modern_full_norm", "tp2 ep2 sp zero1 clip=0.5"),
    # four ranks: two kinds
    _layout(4, "paper", "tp2 ep2 sp zero1"),
    _layout(4, "paper", "pp2 ep2 zero1 clip=0.5"),
    _layout(4, "paper", "pp2 vp2 zero1 recompute=full"),
    _layout(4, "paper", "pp4 zero1 batch=12"),
    _layout(4, "paper_untied", "tp2 pp2 ep2 sp zero1 recompute=selective"),
    _layout(4, "paper_all", "ep2 zero0 clip=0.5"),
    _layout(4, "paper_all_capacity", "tp2 ep4 zero2 clip=0.5"),
    _layout(4, "paper_late_capacity", "pp2 ep2 zero2 clip=0.5"),
    _layout(4, "paper_late", "pp4 zero1 clip=0.5"),
    _layout(4, "modern", "ep4 zero2 batch=16"),
    _layout(4, "modern_capacity", "tp2 etp2 ep2 sp zero1"),
    _layout(4, "modern_dense", "pp4 zero1 clip=0.5"),
    # routers, drops and losses beside the paper's
    _layout(1, "switch_capacity", "zero1"),
    _layout(1, "top8", "zero0"),
    _layout(2, "bias", "ep2 zero1"),
    _layout(2, "grouped_bias", "tp2 ep2 sp zero1"),
    _layout(2, "probability_capacity", "tp2 zero1"),
    _layout(4, "top4", "tp2 ep2 sp zero1 clip=0.5"),
    _layout(4, "top8", "pp2 ep2 zero1 clip=0.5"),
    _layout(4, "bias", "tp2 pp2 etp2 zero1 recompute=full"),
    _layout(4, "bias", "tp2 ep4 sp zero2"),
    _layout(4, "grouped", "ep4 zero2 clip=0.5"),
    _layout(4, "probability_capacity", "pp2 ep2 zero1"),
    # shared experts, residual mixing, pyramids
    _layout(1, "residual_pyramid_capacity", "zero0"),
    _layout(2, "residual", "tp2 zero1 clip=0.5"),
    _layout(2, "shared_gate", "tp2 ep2 sp zero1 recompute=selective"),
    _layout(2, "pyramid", "ep2 zero2 expert_lr=inverse_sqrt_experts"),
    _layout(4, "residual", "tp2 etp2 zero1 recompute=full clip=0.5"),
    _layout(4, "shared", "tp2 pp2 sp zero0 clip=0.5"),
    _layout(4, "pyramid", "pp2 ep2 zero1 clip=0.5"),
    _layout(4, "residual_pyramid_capacity", "tp2 ep4 zero2 clip=0.5"),
    _layout(8, "residual_pyramid_capacity", "tp2 pp2 etp2 ep2 sp zero1 recompute=full"),
    _layout(8, "shared_gate", "tp2 pp2 ep4 zero2 clip=0.5"),
    # the ways to the experts
    _layout(4, "paper_all", "ep4 chunks2 zero1"),
    _layout(4, "paper_all_capacity", "ep4 a2a=hierarchical node2 chunks2 zero1 recompute=full"),
    _layout(4, "modern", "ep4 a2a=hierarchical node2 zero1 clip=0.5"),
    _layout(8, "paper_all", "ep8 zero1 batch=16"),
    _layout(8, "top8", "ep8 a2a=hierarchical node4 chunks2 zero2 batch=16"),
    _layout(8, "modern", "tp2 ep4 sp chunks2 zero1"),
    # eight ranks: three and more
    _layout(8, "bias", "tp2 pp2 ep4 sp zero1 clip=0.5"),
    _layout(8, "global", "tp2 ep4 zero2 clip=0.5 batch=16"),
    _layout(8, "paper", "tp2 pp2 ep2 sp zero1"),
    _layout(8, "paper_capacity", "tp2 pp2 ep2 zero1 clip=0.5 recompute=full"),
    _layout(8, "paper_capacity", "tp2 pp2 vp2 ep2 sp zero1 clip=0.5"),
    _layout(8, "paper_capacity", f"tp2 ep4 sp zero2 clip=0.5 {_SQRT}"),
    _layout(8, "paper_deep", "pp4 vp2 ep2 zero1 clip=0.5 batch=16"),
    _layout(8, "paper_all", f"tp2 pp2 etp2 ep2 sp zero1 clip=0.5 {_SQRT}"),
    _layout(8, "paper_late", "tp2 pp4 ep2 sp zero1 recompute=selective clip=0.5"),
    _layout(8, "paper_dense", "tp2 pp2 sp zero2 clip=0.5"),
    _layout(8, "modern", "tp2 pp2 ep4 sp zero1 clip=0.5"),
    _layout(8, "modern_second", "pp4 ep2 zero1 recompute=full"),
    _layout(8, "modern_capacity", "pp2 ep4 zero2"),
    # pairs of levels that the rows above leave out, several to a row, found by a greedy search
    _layout(4, "paper_dense", "tp2 zero0 recompute=selective clip=0.5"),
    _layout(4, "modern_tied", "tp2 pp2 vp2 zero0 recompute=full clip=0.5"),
    _layout(8, "paper", f"tp2 pp4 etp2 zero2 recompute=full {_SQRT} sharing=4"),
    _layout(8, "paper_untied", f"tp2 pp2 ep4 sp zero0 recompute=full clip=0.5 {_SQRT}"),
    _layout(8, "paper_dense", "pp2 vp2 zero1 recompute=full batch=16"),
    _layout(8, "modern_tied", f"tp2 etp2 ep4 sp zero0 recompute=selective clip=0.5 {_SQRT}"),
    _layout(8, "modern_late", "tp2 pp2 vp2 etp2 ep2 sp zero0 recompute=full"),
    _layout(8, "modern_late", f"pp2 vp2 ep4 zero2 recompute=selective {_SQRT} batch=16"),
    _layout(8, "modern_capacity", f"tp2 pp4 etp2 sp zero0 recompute=selective {_SQRT} sharing=4"),
)


def launches() -> dict[int, dict[str, list[ParityLayout]]]:
    """Layouts by world size, then by model: one start of `world` ranks can run the whole inner dictionary."""
    by_world = sorted(LAYOUTS, key=lambda layout: (layout.world, layout.model))
    return {
        world: {model: list(rows) for model, rows in groupby(group, key=lambda layout: layout.model)}
        for world, group in groupby(by_world, key=lambda layout: layout.world)
    }


def samples(config: Config, num_steps: int = NUM_STEPS) -> np.ndarray:
    """Token ids int64 [num_steps, global batch, seq_length + 1], the same for every layout of one model and batch."""
    shape = (num_steps, config.run.global_batch_size, config.model.seq_length + 1)
    return np.random.default_rng(config.run.seed).integers(0, config.model.vocab_size, shape)
