"""May a configuration go on from a checkpoint, and what differs from the one it was saved under? No torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.errors import CheckpointError

# What the optimizer's state means: another value cannot go on from it.
_OPTIMIZER = ("optimizer.name", "finetune.objective", "finetune.freeze")
# What the weights mean: another value, even one that leaves every shape as it was, is another model.
_MODEL = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "model.num_query_groups", "model.head_dim", "model.vocab_size", "model.vocab_size_multiple",
    "model.normalization", "model.norm_epsilon", "model.activation", "model.position_embedding", "model.rope_base",
    "model.qk_norm", "model.use_bias", "model.tie_embeddings", "model.scale_embeddings",
    "moe.num_experts", "moe.top_k", "moe.layer_pattern", "moe.expert_ffn_hidden_size", "moe.normalize_gates",
    "moe.score_function", "moe.gate_order", "moe.routed_scaling_factor", "moe.num_expert_groups",
    "moe.num_selected_groups", "moe.num_experts_by_layer", "moe.shared_expert_ffn_hidden_size",
    "moe.shared_expert_mix", "model.num_labels",
)  # fmt: skip
# What a run may change without being another: nothing about it is worth a line.
_FREE = (
    "run.dir", "run.num_steps", "run.device", "parallel.timeout_seconds", "checkpoint.", "guard.", "monitor.",
    "preflight.", "restart.", "watchdog.",
)  # fmt: skip


def check_same_model(saved: Mapping[str, Any], config: Config, folder: Path, *, with_optimizer: bool) -> bool:
    """Raises CheckpointError naming what differs if a checkpoint of the configuration `saved` holds another model.

    with_optimizer: its optimizer's state must fit, too. Without it a classifier may begin from a language model:
    returns whether it does.
    """
    gets_head = not with_optimizer and config.model.num_labels > 0 and not saved.get("model", {}).get("num_labels")
    wanted = tuple(key for key in _MODEL if not (gets_head and key == "model.num_labels"))
    changed = list(_differences(saved, config, wanted))
    if changed:
        instead = "resume with that model, choose another run.dir, or set checkpoint.resume false"
        if not with_optimizer:
            instead = "begin from weights of this model, or leave these settings as they are there"
        raise CheckpointError(f"{folder} holds another model ({'; '.join(changed)}): {instead}")
    changed = list(_differences(saved, config, _OPTIMIZER)) if with_optimizer else []
    if changed:
        raise CheckpointError(
            f"{folder} holds the state of another training ({'; '.join(changed)}): resume with that one, or start a "
            "run from its weights alone (checkpoint.load_from and another run.dir)"
        )
    return gets_head


def changed_settings(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Settings that differ from the checkpoint's and may: the user should hear of them."""
    return list(_differences(saved, config, None))


def _differences(saved: Mapping[str, Any], config: Config, keys: tuple[str, ...] | None) -> Iterator[str]:
    """ "key X there, Y here" for each of `keys` (None: all that is neither fixed nor free) whose values differ."""
    here = _flat(config.model_dump(mode="json"))
    # A setting that the checkpoint does not know of yet did then what its default does now.
    there = _flat(Config().model_dump(mode="json")) | _flat(saved)
    for key in sorted(here.keys() | there.keys()):
        fixed, free = key in _MODEL or key in _OPTIMIZER, key.startswith(_FREE)
        wanted = key in keys if keys is not None else not fixed and not free
        if wanted and here.get(key) != there.get(key):
            yield f"{key} {there.get(key)} there, {here.get(key)} here"


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; deeper levels stay values."""
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
