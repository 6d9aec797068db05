"""May a configuration go on from a checkpoint that was written before a setting existed?"""

from pathlib import Path

import pytest

from megamoe.config.schema import Config
from megamoe.errors import CheckpointError
from megamoe.training.checkpoint_state import changed_settings, check_same_model


def old_state() -> dict:
    """As a version wrote it that knew softmax alone."""
    config = Config().model_dump(mode="json")
    later = ("score_function", "gate_order", "routed_scaling_factor", "z_loss_coeff", "num_experts_by_layer",
             "shared_expert_ffn_hidden_size", "shared_expert_mix")  # fmt: skip
    for key in later:
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


def test_another_pyramid_or_shared_expert_is_another_model() -> None:
    moe = {"num_experts": 8, "num_experts_by_layer": [4, 8], "shared_expert_ffn_hidden_size": 32}
    state = {"config": Config.model_validate({"moe": moe}).model_dump(mode="json")}
    check_same_model(state, Config.model_validate({"moe": moe}), Path("step_1"))
    for change, words in {
        ("num_experts_by_layer", (8, 4)): r"moe\.num_experts_by_layer \[4, 8\] there, \[8, 4\] here",
        ("shared_expert_ffn_hidden_size", 16): r"moe\.shared_expert_ffn_hidden_size 32 there, 16 here",
        ("shared_expert_mix", "residual"): r"moe\.shared_expert_mix add there, residual here",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            check_same_model(state, Config.model_validate({"moe": moe | dict([change])}), Path("step_1"))
