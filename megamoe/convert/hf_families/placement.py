"""How Hugging Face classes say which of their layers hold experts. Layers are counted from 0."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.hf_families.keys import Keys
from megamoe.topology.parameters import moe_layers

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Keys to layers, and layers to keys where `refusals` has none."""

    read: Callable[[Keys, int], Layers]
    refusals: Callable[[Config], list[str]]
    write: Callable[[Layers, Config], dict[str, Any]]


def _every(config: Config) -> list[str]:
    layers = moe_layers(config.model, config.moe)
    if len(layers) == config.model.num_layers:
        return []
    return [f"moe.layer_pattern {config.moe.layer_pattern}: all its layers have experts"]


def _read_sparse_step(keys: Keys, num_layers: int) -> Layers:
    step, dense = keys.take("decoder_sparse_step"), keys.take("mlp_only_layers") or ()
    if step < 1:
        keys.refuse(f"decoder_sparse_step {step}", "use 1 or more")
    return tuple(i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense)


def _write_sparse_step(layers: Layers, config: Config) -> dict[str, Any]:
    pattern, num_layers = config.moe.layer_pattern, config.model.num_layers
    if isinstance(pattern, int):
        return {"decoder_sparse_step": pattern, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(num_layers) if i not in layers]}


def _read_interval(keys: Keys, num_layers: int) -> Layers:
    first, last, step = (keys.take(f"moe_layer_{key}") for key in ("start_index", "end_index", "interval"))
    last = num_layers - 1 if last == -1 else last
    if step < 1:
        keys.refuse(f"moe_layer_interval {step}", "use 1 or more")
    return tuple(i for i in range(num_layers) if (i + 1) % step == 0 and first <= i <= last)


def _interval(layers: Layers) -> int | None:
    """The step whose multiples, between the first and last layer counted from 1, these layers are."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    is_one = layers == tuple(range(layers[0], layers[-1] + 1, step)) and (layers[0] + 1) % step == 0
    return step if is_one else None


def _interval_refusals(config: Config) -> list[str]:
    if _interval(moe_layers(config.model, config.moe)) is not None:
        return []
    return [f"moe.layer_pattern {list(config.moe.layer_pattern)}: its layers with experts are every n-th of a range"]


def _write_interval(layers: Layers, config: Config) -> dict[str, Any]:
    pattern, last = config.moe.layer_pattern, config.model.num_layers - 1
    step, first = (pattern, pattern - 1) if isinstance(pattern, int) else (_interval(layers), layers[0])
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": last if isinstance(pattern, int) else layers[-1],
        "moe_layer_interval": step,
    }


PLACEMENTS = {
    "every layer": Placement(lambda keys, n: tuple(range(n)), _every, lambda layers, config: {}),
    "sparse step": Placement(_read_sparse_step, lambda config: [], _write_sparse_step),
    "interval": Placement(_read_interval, _interval_refusals, _write_interval),
}
