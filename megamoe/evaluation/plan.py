"""From what a command is asked for to what ranks are to do: models, sets, capacity, what is done already. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamoe.checkpoint.commit import library_versions
from megamoe.checkpoint.folders import complete_checkpoints
from megamoe.checkpoint.manifest import Manifest
from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.evaluation.corpora import describe_tokenizer
from megamoe.evaluation.results import Results, read_results
from megamoe.evaluation.sets import TextSet
from megamoe.inference.identity import model_digest
from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table


@dataclass(frozen=True)
class Capacity:
    """Whether experts drop tokens, and where they begin to: one of the three, or none of them, which drops nothing."""

    factor: float | None = None
    fraction: float | None = None
    as_trained: bool = False

    def overrides(self) -> tuple[str, ...]:
        """The settings that say so; none where nothing is dropped."""
        if not (self.factor or self.fraction or self.as_trained):
            return ()
        chosen = {"factor": self.factor, "fraction": self.fraction}
        return tuple(
            f"moe.eval_capacity_{name}={'null' if value is None else value}" for name, value in chosen.items()
        )

    def describe(self, config: Config) -> dict[str, Any]:
        """As results keep it. Raises ConfigError for a model whose experts cannot drop."""
        if self == Capacity():
            return {"drops_tokens": False, "why": "default"}
        if config.moe.num_experts == 0:
            raise ConfigError("a capacity is of experts, and this model has none: leave it out")
        if config.moe.dropless and self.as_trained:
            return {"drops_tokens": False, "why": "as trained: dropless"}
        if config.moe.dropless:
            raise ConfigError("this model was trained dropless (moe.dropless): its experts have no capacity")
        kind: Literal["factor", "fraction", "as_trained"]
        kind, value = "as_trained", config.moe.capacity_factor
        if self.factor is not None:
            kind, value = "factor", self.factor
        elif self.fraction is not None:
            kind, value = "fraction", self.fraction
        return {"drops_tokens": True, "kind": kind, "value": value}


def checkpoints_of_run(path: Path, steps: Sequence[int] | None) -> list[Path]:
    """All checkpoints of a run, oldest first, or those of `steps`. Raises ConfigError where one is not there."""
    found = {}
    for root in (path, path / "checkpoints"):
        found |= {int(folder.name.rpartition("_")[2]): folder for folder in complete_checkpoints(root)}
    if not found:
        raise ConfigError(f"{path} is no run's folder with checkpoints, of which --every and --steps take several")
    missing = sorted(set(steps or ()) - found.keys())
    if missing:
        have = ", ".join(str(step) for step in sorted(found))
        raise ConfigError(f"{path} has no checkpoint of step {missing[0]}: it has those of steps {have}")
    return [found[step] for step in sorted(found) if steps is None or step in steps]


def model_identity(folder: Path, asked: Path, config: Config) -> dict[str, Any]:
    """What results say of the model in a checkpoint. `asked`: what the command was given, where that is no checkpoint.

    Raises CheckpointError where its manifest is damaged.
    """
    manifest = Manifest.read(folder)
    table = param_table(config.model, config.moe)
    is_own = folder.is_relative_to(asked)  # as they are written: a checkpoint of the run may be a link to elsewhere
    return {
        "checkpoint": str(folder if is_own else asked),
        "folder": str(folder),
        # The manifest of an import names a folder that is another one each time.
        "manifest_checksum": manifest.checksum if is_own else model_digest(manifest),
        "save_id": manifest.save_id,
        "config_hash": manifest.config_hash,
        "step": manifest.step,
        "num_trained_tokens": manifest.state.get("tokens", 0),
        "num_parameters": num_parameters(table),
        "num_active_parameters": num_active_parameters(table, config.moe),
    }


def header(config: Config, num_ranks: int, texts: Sequence[TextSet], capacity: Capacity, device: str) -> dict[str, Any]:
    """What results say of all models together."""
    sizes = config.parallel
    layout = {
        "num_ranks": num_ranks,
        "tensor_parallel_size": sizes.tensor_parallel_size,
        "pipeline_parallel_size": sizes.pipeline_parallel_size,
        "expert_parallel_size": sizes.expert_parallel_size,
        "expert_tensor_parallel_size": sizes.expert_tensor_parallel_size,
        "data_parallel_size": num_ranks // (sizes.tensor_parallel_size * sizes.pipeline_parallel_size),
        "micro_batch_size": config.run.micro_batch_size,
    }
    return {
        "sets": [text.describe() for text in texts],
        "capacity": capacity.describe(config),
        "layout": layout,
        "precision": config.run.precision,
        "device": device,
        "tokenizer": describe_tokenizer(config.data.tokenizer),
        "versions": library_versions(),
    }


def taken_up(wanted: Results, out: Path | None, *, overwrite: bool, keeps_others: bool) -> Results:
    """`wanted`, with what `out` holds of it already. Raises ConfigError where that is of another evaluation."""
    kept = None if out is None or overwrite else read_results(out)
    if kept is None:
        return wanted
    places = {
        model["manifest_checksum"]: {key: model[key] for key in ("checkpoint", "folder")}
        for model in wanted.tree["models"]
    }
    kept.go_on(wanted, out, keeps_others=keeps_others)
    for model in kept.tree["models"]:  # what was imported lies elsewhere this time, and a run may have been moved
        model.update(places.get(model["manifest_checksum"], {}))
    return kept
