"""Which parameters a run trains: frozen ones get no gradient, no place in the optimizer, and no update."""

from collections.abc import Sequence

from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.model.naming import LocalParameter
from megamoe.topology.parameters import param_table
from megamoe.topology.stages import chunk_parameters
from megamoe.topology.updates import is_frozen


def freeze(parameters: Sequence[LocalParameter], config: Config) -> list[LocalParameter]:
    """Freeze what finetune.freeze names, before any engine sees it; returns the others, in order."""
    for local in parameters:
        local.tensor.requires_grad_(not is_frozen(local.parameter, config.finetune))
    return [local for local in parameters if local.tensor.requires_grad]


def check_all_train(config: Config) -> None:
    """Raises ConfigError where a pipeline stage has nothing to train: no optimizer can be made of that."""
    pipeline, virtual = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    if not config.finetune.freeze:
        return
    table = param_table(config.model, config.moe)
    for stage in range(pipeline):
        held = (
            parameter
            for chunk in range(virtual)
            for parameter in chunk_parameters(
                table, num_layers=config.model.num_layers, pipeline=pipeline, virtual=virtual, pipeline_rank=stage,
                chunk=chunk,
            )
        )  # fmt: skip
        if all(is_frozen(parameter, config.finetune) for parameter in held):
            where = "" if pipeline == 1 else f" on pipeline stage {stage}"
            instead = "freeze less" if pipeline == 1 else "freeze less, or use parallel.pipeline_parallel_size 1"
            raise ConfigError(
                f"finetune.freeze [{', '.join(config.finetune.freeze)}] leaves nothing to train{where}: {instead}"
            )
