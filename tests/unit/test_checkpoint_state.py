"""May a configuration go on from a checkpoint that was written before a setting existed?"""

from pathlib import Path

import pytest

from megamoe.config.schema import Config
from megamoe.errors import CheckpointError
from megamoe.training.checkpoint_state import changed_settings, check_same_model


def old_state() -> dict:
    """As a version wrote it that knew softmax alone."""
    config = Config().model_dump(mode="json")
    for key in ("score_function", "gate_order", "routed_scaling_factor", "z_loss_coeff"):
        del config["moe"][key]
    return {"config": config}


def test_a_setting_unknown_then_had_its_default() -> None:
    check_same_model(old_state(), Config(), Path("step_1"))
    assert changed_settings(old_state(), Config()) == []


def test_another_router_is_another_model() -> None:
    config = Config.model_validate({"moe": {"score_function": "sigmoid", "z_loss_coeff": 0.1}})
    with pytest.raises(CheckpointError, match=r"moe\.score_function softmax there, sigmoid here"):
        check_same_model(old_state(), config, Path("step_1"))
    assert changed_settings(old_state(), config) == ["moe.z_loss_coeff 0.0 there, 0.1 here"]
