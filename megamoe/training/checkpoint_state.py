"""The JSON state of a checkpoint: which run it is of, and whether a configuration may go on from it. No torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.errors import CheckpointError

FORMAT = "megamoe-rank-files-2"
STATE_FILE = "state.json"
_KEYS = ("config", "num_ranks", "step", "samples", "skipped_steps", "loss_scaler", "group_steps")

# How the files are cut: another value cannot read them.
_LAYOUT = (
    "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size", "parallel.virtual_pipeline_parallel_size",
    "parallel.expert_parallel_size", "parallel.expert_tensor_parallel_size", "parallel.zero_stage",
    "run.precision", "optimizer.name", "optimizer.implementation",
)  # fmt: skip
# What the weights mean: another value, even one that leaves every shape as it was, is another model.
_MODEL = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "model.num_query_groups", "model.head_dim", "model.vocab_size", "model.vocab_size_multiple",
    "model.normalization", "model.norm_epsilon", "model.activation", "model.position_embedding", "model.rope_base",
    "model.qk_norm", "model.use_bias", "model.tie_embeddings", "model.scale_embeddings",
    "moe.num_experts", "moe.top_k", "moe.layer_pattern", "moe.expert_ffn_hidden_size", "moe.normalize_gates",
    "moe.score_function", "moe.gate_order", "moe.routed_scaling_factor", "moe.num_expert_groups",
    "moe.num_selected_groups", "moe.num_experts_by_layer", "moe.shared_expert_ffn_hidden_size",
    "moe.shared_expert_mix",
)  # fmt: skip
# What a run may change without being another: nothing about it is worth a line.
_FREE = ("run.dir", "run.num_steps", "run.device", "parallel.timeout_seconds", "checkpoint.", "monitor.")


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises CheckpointError when it is missing, damaged, or no state of ours."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is no complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not of format "{FORMAT}"')
    for key in _KEYS:
        if key not in state:
            raise CheckpointError(f'{path} is damaged: it has no "{key}"')
    return state


def check_same_model(state: dict[str, Any], config: Config, folder: Path) -> None:
    """Raises CheckpointError naming what differs if the checkpoint holds another model than `config` describes."""
    changed = list(_differences(state, config, _MODEL))
    if changed:
        raise CheckpointError(
            f"{folder} holds another model ({'; '.join(changed)}): resume with that model, choose another run.dir, "
            "or set checkpoint.resume false"
        )


def check_same_layout(state: dict[str, Any], config: Config, num_ranks: int, folder: Path) -> None:
    """Raises CheckpointError naming what differs if the files are cut otherwise than `config` on `num_ranks` cuts."""
    changed = list(_differences(state, config, _LAYOUT))
    if state["num_ranks"] != num_ranks:
        changed.append(f"{state['num_ranks']} ranks there, {num_ranks} here")
    if changed:
        raise CheckpointError(
            f"{folder} was written by another layout ({'; '.join(changed)}): resume with that layout, "
            "or choose another run.dir"
        )


def changed_settings(state: dict[str, Any], config: Config) -> list[str]:
    """Settings that differ from the checkpoint's and may: the user should hear of them."""
    return list(_differences(state, config, None))


def _differences(state: dict[str, Any], config: Config, keys: tuple[str, ...] | None) -> Iterator[str]:
    """ "key X there, Y here" for each of `keys` (None: all that is neither fixed nor free) whose values differ."""
    here = _flat(config.model_dump(mode="json"))
    # A setting that the checkpoint does not know of yet did then what its default does now.
    there = _flat(Config().model_dump(mode="json")) | _flat(state["config"])
    for key in sorted(here.keys() | there.keys()):
        fixed, free = key in _MODEL or key in _LAYOUT, key.startswith(_FREE)
        wanted = key in keys if keys is not None else not fixed and not free
        if wanted and here.get(key) != there.get(key):
            yield f"{key} {there.get(key)} there, {here.get(key)} here"


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; deeper levels stay values."""
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
