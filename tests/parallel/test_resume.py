"""A run that is resumed under the same layout is the run that did not stop, to the bit."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megamoe.model.random import random_state
from megamoe.runs.run_folder import resumable_checkpoints
from megamoe.training import build, saving
from megamoe.training.build import Trainer
from megamoe.training.optimizer import parameter_groups
from megamoe.training.restore import load_checkpoint
from megamoe.training.saving import CheckpointSaver, save_checkpoint
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
    "two": (2, (*parallel(tp=2, zero=0), *DROPOUT, "optimizer.name=sgd", "optimizer.momentum=0.9")),
    "two_jitter": (2, (*parallel(pp=2, zero=2), *DROPOUT, "moe.input_jitter=0.1")),
    "two_bf16": (2, (*parallel(ep=2, zero=2), *DROPOUT, "run.precision=bf16")),
    "four_bf16": (4, (*parallel(tp=2, ep=4, sp=True, zero=1), *DROPOUT, "run.precision=bf16", *BIAS)),
    "four": (4, (*parallel(ep=2, zero=0), *DROPOUT)),
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


@contextmanager
def writers_held() -> Iterator[None]:
    """Nothing is written until the end of the block."""
    usual, gate = saving.write_rank, threading.Event()
    saving.write_rank = lambda *args, **kwargs: (gate.wait(60), usual(*args, **kwargs))
    try:
        yield
    finally:
        gate.set()
        saving.write_rank = usual


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
            assert steps(trainer, batches[:1]) == rows[:1]
            if name.startswith("eight"):  # what is saved is the state of now, though training goes on at once
                assert steps(trainer, batches[1:2]) == rows[1:2]
                saver = CheckpointSaver(trainer, f"{root}/{name}", print)
                saver.prepare()
                with writers_held():
                    saver.save()
                    assert steps(trainer, batches[2:3]) == rows[2:3], "a save draws no random numbers"
                saver.wait()
            else:
                assert steps(trainer, batches[1:2]) == rows[1:2]
                save_checkpoint(trainer, f"{root}/{name}")
    return found


def resumed(names: list[str], root: str) -> dict[str, Any]:
    """The last two steps in new processes, which have drawn other random numbers meanwhile."""
    found = {}
    for name in names:
        with run_of(name) as trainer:
            torch.rand(17)
            (folder,) = resumable_checkpoints(f"{root}/{name}")
            assert load_checkpoint(trainer, folder).notes == ()
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
