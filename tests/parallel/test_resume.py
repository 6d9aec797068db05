"""A resumed run is the run that did not stop, to the bit; a save that did not finish, or was damaged, is told apart."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megamoe.errors import CheckpointError
from megamoe.model.random import random_state
from megamoe.training import build
from megamoe.training.build import Trainer
from megamoe.training.checkpoint import load_checkpoint, save_checkpoint
from megamoe.training.optimizer import parameter_groups
from megamoe.training.run_folder import checkpoints_path, latest_checkpoint
from tests.harness import run_ranks
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    config,
    optimizer_state,
    parallel,
    samples,
    steps,
    trainer_of,
    weights,
)

DROPOUT = ("model.hidden_dropout=0.2", "model.attention_dropout=0.2")
FP16 = ("run.precision=fp16", "optimizer.initial_loss_scale=1048576", "optimizer.loss_scale_window_steps=1")
BIAS = ("moe.score_function=sigmoid", "moe.balance_bias_update_rate=0.01", "moe.input_jitter=0.1")
PYRAMID = (
    "moe.num_experts=8", "moe.num_experts_by_layer=[2,8]", "moe.shared_expert_ffn_hidden_size=48",
    "moe.shared_expert_mix=residual", "optimizer.expert_lr_scale=inverse_sqrt_experts",
)  # fmt: skip
# name -> ranks, settings. The fp16 run still looks for its loss scale when it is cut.
RUNS = {
    "one": (1, (*parallel(zero=0), *DROPOUT)),
    "one_fp16": (1, (*parallel(zero=1), *DROPOUT, *FP16)),
    "one_apex": (1, (*parallel(zero=1), "optimizer.lr=0.02")),  # by an optimizer like NVIDIA apex's
    "one_bias": (1, (*parallel(zero=1), *BIAS)),
    "two_pyramid": (2, (*parallel(ep=2, zero=1), *BIAS, *PYRAMID, "run.precision=bf16")),
    "two_bf16": (2, (*parallel(ep=2, zero=2), *DROPOUT, "run.precision=bf16")),
    "eight": (8, (*parallel(tp=2, pp=2, ep=2, zero=1), *DROPOUT, "optimizer.clip_grad=0.5")),
}


class GroupStepAdam(torch.optim.Optimizer):
    """Adam that keeps its step in the group, and no step among the tensors of its state, as apex's FusedAdam does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                state["exp_avg_sq"].mul_(0.98).addcmul_(parameter.grad, parameter.grad, value=0.02)
                mean = state["exp_avg"] / (1 - 0.9 ** group["step"])
                square = state["exp_avg_sq"] / (1 - 0.98 ** group["step"])
                parameter.addcdiv_(mean, square.sqrt() + 1e-3, value=-group["lr"])


@contextmanager
def run_of(name: str) -> Iterator[Trainer]:
    get_accelerator().is_fp16_supported = lambda: True
    usual = build.build_optimizer
    if name == "one_apex":
        build.build_optimizer = lambda parameters, settings: GroupStepAdam(
            parameter_groups(parameters, settings), {"lr": 1.0}
        )
    try:
        with trainer_of(settings_of(name)) as trainer:
            yield trainer
    finally:
        build.build_optimizer = usual


def settings_of(name: str, *more: str):
    return config("paper", (*RUNS[name][1], *more))


def all_state(trainer: Trainer) -> dict[str, Any]:
    scaler = getattr(trainer.engine.optimizer, "loss_scaler", None)
    arrays = {f"bias.{layer}": bias.numpy().copy() for layer, bias in trainer.balance_bias.by_layer.items()}
    arrays |= {name: t.numpy() for name, t in random_state().items()}
    return {
        "arrays": arrays | weights(trainer) | optimizer_state(trainer),
        "counts": (trainer.step, trainer.samples, trainer.skipped_steps),
        "group_steps": [group.get("step") for group in trainer.engine.basic_optimizer.param_groups],
        "scaler": None if scaler is None else dict(vars(scaler)),
    }


def straight_and_cut(names: list[str], root: str) -> dict[str, Any]:
    """Four steps without a stop; then two steps of a second run, and its checkpoint."""
    found = {}
    for name in names:
        batches = samples(settings_of(name), 4)
        with run_of(name) as trainer:
            rows = steps(trainer, batches)
            found[name] = {"rows": rows[2:], **all_state(trainer)}
        with run_of(name) as trainer:
            assert steps(trainer, batches[:2]) == rows[:2]
            save_checkpoint(trainer, f"{root}/{name}")
    return found


def resumed(names: list[str], root: str) -> dict[str, Any]:
    """The last two steps in new processes, which have drawn other random numbers meanwhile."""
    found = {}
    for name in names:
        with run_of(name) as trainer:
            torch.rand(17)
            folder = latest_checkpoint(f"{root}/{name}")
            assert folder is not None
            load_checkpoint(trainer, folder)
            found[name] = {"rows": steps(trainer, samples(trainer.config, 4)[2:]), **all_state(trainer)}
    return found


@cache
def launch(world: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    names = [name for name, (ranks, _) in RUNS.items() if ranks == world]
    with tempfile.TemporaryDirectory() as root:
        before = run_ranks(straight_and_cut, world, names, root, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
        after = run_ranks(resumed, world, names, root, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
    return before, after


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(name):
    before, after = launch(RUNS[name][0])
    for rank_before, rank_after in zip(before, after, strict=True):
        expected, actual = rank_before[name], rank_after[name]
        assert actual["rows"] == expected["rows"]
        assert actual["counts"] == expected["counts"]
        assert actual["scaler"] == expected["scaler"]
        assert actual["group_steps"] == expected["group_steps"]
        assert_same_arrays(actual["arrays"], expected["arrays"])


def test_the_runs_were_cut_where_it_matters():
    """The fp16 scale moved before the cut and after it; biases moved; the apex-like optimizer had counted steps."""
    before, _ = launch(1)
    found = before[0]["one_fp16"]
    assert [row["was_applied"] for row in found["rows"]] != [True, True] and found["scaler"]["cur_iter"] == 4
    assert any(name.startswith("bias.") and bias.any() for name, bias in before[0]["one_bias"]["arrays"].items())
    assert before[0]["one_apex"]["group_steps"] == [4] * len(before[0]["one_apex"]["group_steps"])


# --- what lies in the folder ------------------------------------------------------------------------------------------


def folders_of_a_run(root: str) -> dict[str, Any]:
    """Saves of one rank, with debris in between, and what the folder held after each."""
    settings, seen = settings_of("one", "checkpoint.keep_last=2"), {}
    checkpoints = checkpoints_path(root)
    with trainer_of(settings) as trainer:
        batches = samples(settings, 1)
        for number in range(1, 5):
            steps(trainer, batches)
            if number == 3:  # a crash in the middle of a save, of this step and of another
                for name in (".step_00000003.partial", ".step_00000009.partial"):
                    (checkpoints / name).mkdir()
                    (checkpoints / name / "rank_00000.safetensors").write_bytes(b"half")
                seen["in_force_beside_debris"] = latest_checkpoint(root).name
            save_checkpoint(trainer, root)
            seen[number] = sorted(os.listdir(checkpoints)), latest_checkpoint(root).name
        # Back to step 3 by hand, as `latest` invites to; the abandoned step 4 must not push out what is new.
        (checkpoints / "latest").write_text("step_00000003\n")
        load_checkpoint(trainer, latest_checkpoint(root))
        shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000007")
        shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000008")
        trainer.step = 5
        save_checkpoint(trainer, root)
        seen["rolled_back"] = latest_checkpoint(root).name
    return seen


def test_debris_is_ignored_then_cleaned_and_old_checkpoints_go(tmp_path):
    (seen,) = run_ranks(folders_of_a_run, 1, str(tmp_path), init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
    assert seen["in_force_beside_debris"] == "step_00000002"
    for number in range(1, 5):
        last_two = [f"step_{step:08d}" for step in (number - 1, number) if step]
        assert seen[number] == (sorted(["latest", *last_two]), last_two[-1])
    assert seen["rolled_back"] == "step_00000005"


# --- errors -----------------------------------------------------------------------------------------------------------


def message(trainer: Trainer, folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(trainer, folder)
    return str(error.value)


def errors(root: str) -> dict[str, str]:
    """What loading says of a good checkpoint in another layout, and of damaged copies in the right one."""
    base, found = Path(root), {}
    with trainer_of(settings_of("one")) as trainer:  # saved before any step: the optimizer has no state yet
        good = save_checkpoint(trainer, root)
        load_checkpoint(trainer, good)

        def damaged(name: str) -> Path:
            return shutil.copytree(good, base / name)

        missing = damaged("missing")
        (missing / "rank_00000.safetensors").unlink()
        truncated = damaged("truncated")
        os.truncate(truncated / "rank_00000.safetensors", 1000)
        torn = damaged("torn")
        (torn / "state.json").write_text('{"format": "megamoe-rank-files-2", "step"')
        keyless = damaged("keyless")
        (keyless / "state.json").write_text('{"format": "megamoe-rank-files-2", "step": 3}')
        foreign = damaged("foreign")
        (foreign / "state.json").write_text('{"format": "other"}')
        stateless = damaged("stateless")
        (stateless / "state.json").unlink()
        found = {p.name: message(trainer, p) for p in (missing, truncated, torn, keyless, foreign, stateless)}
    with trainer_of(settings_of("one", "parallel.zero_stage=1", "parallel.recompute=full")) as trainer:
        found["layout"] = message(trainer, good)
    with trainer_of(settings_of("one", "model.tie_embeddings=false")) as trainer:
        found["tensors"] = message(trainer, claiming(good, trainer, base / "tensors"))
    with trainer_of(settings_of("one", "model.ffn_hidden_size=32")) as trainer:
        found["model"] = message(trainer, good)
        found["shape"] = message(trainer, claiming(good, trainer, base / "shape"))
    with trainer_of(settings_of("one", "optimizer.lr=0.25")) as trainer:
        found["changed"] = load_checkpoint(trainer, good)
    return found


def claiming(good: Path, trainer: Trainer, copy: Path) -> Path:
    """A copy of a checkpoint whose state says that it is of the trainer's model, which its tensors belie."""
    shutil.copytree(good, copy)
    state = json.loads((copy / "state.json").read_text())
    state["config"] = trainer.config.model_dump(mode="json")
    (copy / "state.json").write_text(json.dumps(state))
    return copy


def test_errors_name_file_and_remedy(tmp_path):
    (found,) = run_ranks(errors, 1, str(tmp_path), init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
    rank_file = "rank_00000.safetensors"
    good = checkpoints_path(tmp_path) / "step_00000000"
    assert found["missing"] == (
        f"{tmp_path}/missing/{rank_file} is missing: {tmp_path}/missing is incomplete, "
        "remove it to go on without it"
    )
    assert found["truncated"].startswith(f"{tmp_path}/truncated/{rank_file} cannot be read (")
    assert found["truncated"].endswith("): the checkpoint is damaged")
    assert found["torn"] == (
        f"{tmp_path}/torn/state.json is damaged: Expecting ':' delimiter: line 1 column 42 (char 41)"
    )
    assert found["keyless"] == f'{tmp_path}/keyless/state.json is damaged: it has no "config"'
    assert found["foreign"] == f'{tmp_path}/foreign/state.json is not of format "megamoe-rank-files-2"'
    assert found["stateless"] == (
        f"{tmp_path}/stateless/state.json is missing: {tmp_path}/stateless is no complete checkpoint"
    )
    assert found["layout"] == (
        f"{good} was written by another layout (parallel.zero_stage 0 there, 1 here): resume with that layout, "
        "or choose another run.dir"
    )
    assert found["model"] == (
        f"{good} holds another model (model.ffn_hidden_size 64 there, 32 here): resume with that model, "
        "choose another run.dir, or set checkpoint.resume false"
    )
    assert len(found["changed"]) == 1 and found["changed"][0].startswith("optimizer.lr ")
    assert found["changed"][0].endswith(" there, 0.25 here")
    assert found["tensors"].startswith(f"{tmp_path}/tensors/{rank_file} does not match the model: ")
    assert found["tensors"].endswith(" is only in one of them")
    assert found["shape"] == (
        f"{tmp_path}/shape/{rank_file}: parameter/layers.0.ffn.fc1.weight has shape (64, 32), the model's is (32, 32)"
    )


def test_latest_that_names_nothing_is_an_error(tmp_path):
    checkpoints = checkpoints_path(tmp_path)
    (checkpoints / "step_00000004").mkdir(parents=True)
    (checkpoints / "latest").write_text("step_00000006\n")
    with pytest.raises(CheckpointError) as error:
        latest_checkpoint(tmp_path)
    assert str(error.value) == (
        f'{checkpoints}/latest names "step_00000006", which is no checkpoint beside it: write the name of one of '
        "['step_00000004'] into it, or remove it to start anew"
    )
    (checkpoints / "latest").unlink()
    assert latest_checkpoint(tmp_path) is None
