"""Which parameters a checkpoint holds by their weights alone, because the run that wrote it does not train them."""

from collections.abc import Mapping
from typing import Any

from megamoe.config.schema import Config
from megamoe.topology.parameters import param_table
from megamoe.topology.updates import is_frozen


def frozen_parameters(config: Mapping[str, Any]) -> frozenset[str]:
    """Names, by a configuration as a manifest has it; none where it says nothing of frozen parts."""
    if not (config.get("finetune") or {}).get("freeze"):
        return frozenset()
    try:
        resolved = Config.model_validate(config)
    except ValueError:  # another version's: what follows from it is not known here
        return frozenset()
    table = param_table(resolved.model, resolved.moe)
    return frozenset(parameter.name for parameter in table if is_frozen(parameter, resolved.finetune))
