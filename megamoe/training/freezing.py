"""Which parameters a run trains: frozen ones get no gradient, no place in the optimizer, and no update."""

from collections.abc import Sequence

from megamoe.config.schema import Config
from megamoe.model.naming import LocalParameter
from megamoe.topology.updates import is_frozen


def freeze(parameters: Sequence[LocalParameter], config: Config) -> list[LocalParameter]:
    """Freeze what finetune.freeze names, before any engine sees it; returns the others, in order."""
    for local in parameters:
        local.tensor.requires_grad_(not is_frozen(local.parameter, config.finetune))
    return [local for local in parameters if local.tensor.requires_grad]
