"""May a configuration go on from a checkpoint that was written before a setting existed?"""

from pathlib import Path

import pytest

from megamoe.config.schema import Config
from megamoe.errors import CheckpointError
from megamoe.training.checkpoint_state import changed_settings, check_same_model


def old_config() -> dict:
    """As a version wrote it that knew softmax alone."""
    config = Config().model_dump(mode="json")
    later = ("score_function", "gate_order", "routed_scaling_factor", "z_loss_coeff", "num_experts_by_layer",
             "shared_expert_ffn_hidden_size", "shared_expert_mix")  # fmt: skip
    for key in later:
        del config["moe"][key]
    return config


def test_a_setting_unknown_then_had_its_default() -> None:
    check_same_model(old_config(), Config(), Path("step_1"), with_optimizer=True)
    assert changed_settings(old_config(), Config()) == []


def test_another_router_is_another_model() -> None:
    config = Config.model_validate({"moe": {"score_function": "sigmoid", "z_loss_coeff": 0.1}})
    with pytest.raises(CheckpointError, match=r"moe\.score_function softmax there, sigmoid here"):
        check_same_model(old_config(), config, Path("step_1"), with_optimizer=True)
    assert changed_settings(old_config(), config) == ["moe.z_loss_coeff 0.0 there, 0.1 here"]


def test_layout_precision_and_schedule_are_free_and_told() -> None:
    saved = Config().model_dump(mode="json")
    config = Config.model_validate(
        {"parallel": {"tensor_parallel_size": 2}, "run": {"precision": "bf16"}, "optimizer": {"lr": 0.5}}
    )
    check_same_model(saved, config, Path("step_1"), with_optimizer=True)
    told = changed_settings(saved, config)
    assert [line.split(" ")[0] for line in told] == ["optimizer.lr", "parallel.tensor_parallel_size", "run.precision"]


def test_another_optimizer_is_refused_but_for_its_weights() -> None:
    saved, config = Config().model_dump(mode="json"), Config.model_validate({"optimizer": {"name": "sgd"}})
    with pytest.raises(CheckpointError, match=r"another training \(optimizer\.name adamw there, sgd here\)"):
        check_same_model(saved, config, Path("step_1"), with_optimizer=True)
    check_same_model(saved, config, Path("step_1"), with_optimizer=False)


def test_another_pyramid_or_shared_expert_is_another_model() -> None:
    moe = {"num_experts": 8, "num_experts_by_layer": [4, 8], "shared_expert_ffn_hidden_size": 32}
    saved = Config.model_validate({"moe": moe}).model_dump(mode="json")
    check_same_model(saved, Config.model_validate({"moe": moe}), Path("step_1"), with_optimizer=True)
    for change, words in {
        ("num_experts_by_layer", (8, 4)): r"moe\.num_experts_by_layer \[4, 8\] there, \[8, 4\] here",
        ("shared_expert_ffn_hidden_size", 16): r"moe\.shared_expert_ffn_hidden_size 32 there, 16 here",
        ("shared_expert_mix", "residual"): r"moe\.shared_expert_mix add there, residual here",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            check_same_model(
                saved, Config.model_validate({"moe": moe | dict([change])}), Path("step_1"), with_optimizer=True
            )
