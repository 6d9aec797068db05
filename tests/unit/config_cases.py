"""What the tests of configurations share."""

import pytest

from megamoe.config import load_config, validate
from megamoe.errors import ConfigError


def refused(call, *arguments) -> str:
    """The message of the ConfigError that `call` must raise."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def checked(*overrides: str, world_size: int | None = None) -> None:
    validate(load_config("quickstart", overrides), world_size)


ONE_RANK = ("parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.expert_parallel_size=1")
DENSE = ("moe.num_experts=0", "parallel.expert_parallel_size=1")
