"""The checkpoints an operation reads: weights at their best precision, balance biases, nothing of an optimizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.checkpoint.slices import Slice
from megamoe.config.loading import override_config
from megamoe.config.schema import Config, MoEConfig
from megamoe.errors import ConfigError, ConversionError
from megamoe.topology.parameters import Parameter

WEIGHT, MASTER, BALANCE_BIAS = "weight", "master", "balance_bias"


class Sources:
    """Open checkpoints, in the order given. Masters stand in for 16-bit weights wherever a checkpoint has them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises CheckpointError for what is no whole checkpoint, ConversionError for one without weights."""
        self.folders = tuple(folders)
        self.checkpoints: list[Checkpoint] = []
        try:
            for folder in folders:
                self.checkpoints.append(Checkpoint.open(folder))
                if WEIGHT not in self.checkpoints[-1].manifest.kinds:
                    raise ConversionError(f"{folder} holds no weights: give a checkpoint of a model")
            self.configs = tuple(config_of(checkpoint) for checkpoint in self.checkpoints)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> "Sources":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> Config:
        """Of the first."""
        return self.configs[0]

    @property
    def identity(self) -> list[str]:
        """What stands for the bytes of all of them: the manifests' checksums, which cover the blocks' checksums."""
        return [checkpoint.manifest.checksum for checkpoint in self.checkpoints]

    def find(self, name: str, source: int = 0) -> TensorEntry | None:
        """The parameter `name`: its master where there is one, else its weight."""
        tensors = self.checkpoints[source].manifest.tensors
        return tensors.get((MASTER, name)) or tensors.get((WEIGHT, name))

    def parameter(self, name: str, source: int = 0) -> TensorEntry:
        """As `find`. Raises ConversionError where there is none."""
        entry = self.find(name, source)
        if entry is None:
            raise ConversionError(f"{self.folders[source]} has no {name}, which its configuration promises")
        return entry

    def parameter_like(self, parameter: Parameter, shape: tuple[int, ...]) -> TensorEntry:
        """The first source's `parameter`. Raises ConversionError unless it has one, of this shape."""
        entry = self.find(parameter.name)
        if entry is None or entry.shape != shape:
            there = "has none" if entry is None else f"has it as {list(entry.shape)}"
            raise ConversionError(
                f"the new model has {parameter.name} {list(parameter.shape)}, but {self.folders[0]} {there}: "
                "only routed experts and their number can change here"
            )
        return entry

    def balance_bias(self, layer: int, source: int = 0) -> TensorEntry | None:
        """The balance bias [E] of a layer's router, or None."""
        return self.checkpoints[source].manifest.tensors.get((BALANCE_BIAS, f"layers.{layer}.router"))

    def read(self, source: int, wanted: Slice, out: np.ndarray) -> None:
        """Fill `out` [elements, as stored]; every block is checked."""
        self.checkpoints[source].read(wanted, out)


def changed_config(sources: Sources, settings: Sequence[str], fixed: dict[str, Any]) -> Config:
    """The first source's configuration with "moe.key=value" and "parallel.key=value" settings, and `fixed` under moe.

    Raises ConfigError for settings of another section, and for those that the operation itself decides.
    """
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if not key.startswith(("moe.", "parallel.")):
            raise ConfigError(f'"{setting}" cannot be set here: an operation on experts takes moe.* and parallel.*')
        if key.removeprefix("moe.") in fixed:
            raise ConfigError(f"{key} follows from the operation's own arguments: leave it out of the settings")
    config = override_config(sources.config, settings, str(sources.folders[0]))
    moe = config.moe.model_copy(update=fixed)
    checkpoint = config.checkpoint.model_copy(update={"load_from": None})  # where the old run began
    return config.model_copy(update={"moe": moe, "checkpoint": checkpoint})


# What the scores of a router come to, given its weights.
_RULES = (
    "top_k",    "score_function", "gate_order", "normalize_gates", "routed_scaling_factor", "num_expert_groups",
    "num_selected_groups", "shared_expert_mix",
)  # fmt: skip


def changed_rules(old: MoEConfig, new: MoEConfig, besides: Sequence[str] = ()) -> tuple[str, ...]:
    """A sentence for each rule of routing that the settings change."""
    return tuple(
        f"moe.{rule} is {getattr(new, rule)}, in the source {getattr(old, rule)}"
        for rule in _RULES
        if rule not in besides and getattr(old, rule) != getattr(new, rule)
    )
