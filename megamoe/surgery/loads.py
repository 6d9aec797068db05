"""Tokens per expert, and who is the busiest.

A run counts them in `expert_loads.jsonl`, an interval of steps a line. Counts over other text come from a JSON file,
{"layer": [counts]}.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megamoe.errors import ConfigError
from megamoe.runs.line_stream import json_lines
from megamoe.runs.metrics import EXPERT_LOADS_FILE

Loads = Mapping[int, Sequence[float]]  # 0-based MoE layer -> tokens of each expert


def read_loads(path: Path, num_experts: Mapping[int, int]) -> dict[int, list[float]]:
    """The loads of a JSON file, of a run's folder or of its expert_loads.jsonl; num_experts: MoE layer -> experts.

    Raises ConfigError for a file that does not fit them.
    """
    path = path / EXPERT_LOADS_FILE if path.is_dir() else path
    tree = _sums(path, num_experts) if path.name.endswith(".jsonl") else read_layers(path, num_experts)
    for layer, counts in tree.items():
        where = f"{path}: layer {layer}"
        if len(counts) != num_experts[layer]:
            raise ConfigError(f"{where} has {len(counts)} counts, but {num_experts[layer]} experts: give one for each")
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count < math.inf:
                raise ConfigError(f"{where} has the count {str(count)[:40]}: use numbers of 0 or more")
        if not sum(counts):
            raise ConfigError(f"{where} has no token at all: count over some text")
    return {layer: [float(count) for count in counts] for layer, counts in tree.items()}


def _sums(path: Path, num_experts: Mapping[int, int]) -> dict[int, list[float]]:
    """Over the lines of a run, where a step stands once, however often it was done. Other lines are left out."""
    sizes = {str(layer): count for layer, count in num_experts.items()}
    total = {layer: [0.0] * count for layer, count in num_experts.items()}
    num_lines = 0
    for line in json_lines(path):
        layers = line.get("layers")
        if not isinstance(layers, dict) or not all(_are_numbers(counts) for counts in layers.values()):
            continue
        if {layer: len(counts) for layer, counts in layers.items()} == sizes:
            num_lines += 1
            for layer, sums in total.items():
                total[layer] = [one + more for one, more in zip(sums, layers[str(layer)], strict=True)]
    if not num_lines:
        raise ConfigError(
            f"{path} holds no loads of these layers and experts: give the run's own, or a JSON file with counts"
        )
    return total


def _are_numbers(counts: object) -> bool:
    return isinstance(counts, list) and all(isinstance(count, int | float) for count in counts)


def read_layers(path: Path, num_experts: Mapping[int, int]) -> dict[int, list]:
    """A JSON object with a list for each MoE layer, as {"1": [...], "3": [...]}; ascending by layer.

    Raises ConfigError where the file is anything else, or its layers are not those with experts.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({str(error)[:80]})") from None
    layers = ", ".join(str(layer) for layer in num_experts)
    if not isinstance(tree, dict) or not all(isinstance(value, list) for value in tree.values()):
        raise ConfigError(f'{path} must hold an object with a list for each of the layers {layers}, as {{"1": [3, 5]}}')
    if set(tree) != {str(layer) for layer in num_experts}:
        raise ConfigError(f"{path} is about layers {', '.join(tree)}, but layers with experts are {layers} (from 0)")
    return {layer: tree[str(layer)] for layer in num_experts}


def busiest_first(loads: Sequence[float], experts: Sequence[int]) -> list[int]:
    """Expert numbers by load, the largest first; of equal ones the lower number first."""
    return sorted(experts, key=lambda expert: (-loads[expert], expert))


def routing_groups(num_experts: int, num_groups: int | None) -> list[range]:
    """The neighbouring experts that each routing group (moe.num_expert_groups) holds; one group where there is none."""
    size = num_experts // (num_groups or 1)
    return [range(first, first + size) for first in range(0, num_experts, size)]


def share_of_group(layer: int, count: int, num_groups: int | None) -> int:
    """How many of `count` new experts each routing group gets. Raises ConfigError where that is no whole number."""
    if count % (num_groups or 1):
        raise ConfigError(
            f"{count} experts in layer {layer} are no multiple of num_expert_groups {num_groups}: use a multiple"
        )
    return count // (num_groups or 1)
