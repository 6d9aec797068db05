"""A roll back in the running processes is the run resumed by hand from that checkpoint, behind the samples skipped."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megamoe.model.random import random_state
from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from megamoe.training.build import Trainer
from megamoe.training.guard import LossGuard
from megamoe.training.hooks import Saver, SkipGuard
from megamoe.training.loop import train
from megamoe.training.restore import load_checkpoint
from megamoe.training.saving import CheckpointSaver
from tests.harness import run_ranks
from tests.parallel.guard_cases import BIAS, CONSTANT, DROPOUT, GUARD, LAYOUTS, Fault, fault
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    config,
    optimizer_state,
    trainer_of,
    weights,
)

SAVE_EVERY, NUM_STEPS = 4, 14
FAULTY_STEP, ROLLED_BACK_TO = 11, 8
NAMES = ("one", "stages", "interleaved", "sequence", "all")  # ZeRO 0, 2, 0, 2, 1
RESUMED = {name: (ROLLED_BACK_TO, 12) if name == "sequence" else (ROLLED_BACK_TO,) for name in NAMES}
NAN = Fault("activation", 0, 0, math.nan, 0.7)
LOSS = Fault("loss", 0, 1, 60.0, 0.0)


class Corpus:
    """Samples drawn from their numbers; `read` keeps the numbers."""

    num_samples = 1 << 40

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.vocab_size, self.seq_length = vocab_size, seq_length

    def sample(self, index: int) -> np.ndarray:
        return np.random.default_rng([3, index]).integers(0, self.vocab_size, self.seq_length + 1)


def settings_of(name: str, *more: str):
    return config("paper", (
        *LAYOUTS[name][1], *CONSTANT, *GUARD, *DROPOUT, *BIAS, "guard.action=roll_back", f"run.num_steps={NUM_STEPS}",
        f"checkpoint.save_interval_steps={SAVE_EVERY}", "checkpoint.keep_last=9", *more,
    ))  # fmt: skip


class Run:
    """A trainer with the hooks that matter here; what is wrong with a step hangs on the samples that it reads."""

    def __init__(self, trainer: Trainer, run_dir: Path, faults: dict[int, Fault], copies: Path | None = None) -> None:
        self.trainer, self.events, self.starts, self.copies = trainer, [], [], copies
        self.saver = CheckpointSaver(trainer, str(run_dir), say=lambda text: None)
        interval = trainer.config.checkpoint.save_interval_steps
        self.hooks = [self.guard(), SkipGuard(20), Saver(self.saver, interval, at_end=False)]
        usual = trainer.train_step

        def step(batch: Any, batch_size: int) -> Any:
            self.starts.append(trainer.samples)
            with fault(trainer, faults.get(trainer.samples)):
                return usual(batch, batch_size)

        trainer.train_step = step

    def guard(self) -> LossGuard:
        return LossGuard(
            self.saver,
            lambda kind, message, **details: self.events.append((kind, message, details)),
            after_roll_back=self.copy,
        )

    def copy(self, step: int) -> None:
        """What was loaded, before its place is taken."""
        if self.copies is not None and dist.get_rank() == 0:
            shutil.copytree(self.saver.root / checkpoint_name(step), self.copies / checkpoint_name(step))

    def go_on(self) -> "Run":
        model = self.trainer.config.model
        train(self.trainer, Corpus(model.vocab_size, model.seq_length), self.hooks)
        self.saver.wait()
        return self

    def state(self) -> dict[str, Any]:
        trainer = self.trainer
        arrays = {f"bias.{layer}": bias.numpy().copy() for layer, bias in trainer.balance_bias.by_layer.items()}
        arrays |= {name: value.numpy() for name, value in random_state().items()}
        return {
            "arrays": arrays | weights(trainer) | optimizer_state(trainer),
            "counts": (trainer.step, trainer.samples, trainer.skipped_steps),
            "judge": trainer.judge.state(),
            "loss": trainer.engine.finalizer.loss,
        }


def on_rank(names: Sequence[str], root: str) -> dict[str, Any]:
    return {name: scenario(name, Path(root) / name) for name in names}


def scenario(name: str, root: Path) -> dict[str, Any]:
    settings = settings_of(name)
    batch = settings.run.global_batch_size
    faults = {(FAULTY_STEP - 1) * batch: NAN if name in ("one", "stages", "all") else LOSS}
    found: dict[str, Any] = {"batch": batch}
    with trainer_of(settings) as trainer:
        run = Run(trainer, root / "run", faults, copies=root).go_on()
        found["rolled back"] = run.state() | {"events": run.events, "starts": run.starts}
    with trainer_of(settings) as trainer:
        load_checkpoint(trainer, root / checkpoint_name(ROLLED_BACK_TO))
        trainer.samples = FAULTY_STEP * batch
        found["by hand"] = Run(trainer, root / "by_hand", {}).go_on().state()
    for step in RESUMED[name]:  # the process died right after the roll back, or later
        with trainer_of(settings) as trainer:
            load_checkpoint(trainer, checkpoints_path(root / "run") / checkpoint_name(step))
            found[f"resumed at {step}"] = Run(trainer, root / f"again_{step}", faults).go_on().state()
    return found


@cache
def launch(world: int) -> list[dict[str, Any]]:
    names = [name for name in NAMES if LAYOUTS[name][0] == world]
    with tempfile.TemporaryDirectory() as root:
        return run_ranks(on_rank, world, names, root, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def of_layout(name: str) -> list[dict[str, Any]]:
    return [rank[name] for rank in launch(LAYOUTS[name][0])]


@pytest.mark.parametrize("name", NAMES)
def test_roll_back_is_the_run_resumed_by_hand_behind_the_skipped_samples(name):
    for rank in of_layout(name):
        actual, expected = rank["rolled back"], rank["by hand"]
        assert_same_arrays(actual["arrays"], expected["arrays"])
        assert actual["counts"] == expected["counts"] and actual["loss"] == expected["loss"]
        history = ("roll_backs", "num_spikes")
        window = [{key: value for key, value in each["judge"].items() if key not in history} for each in
                  (actual, expected)]  # fmt: skip
        assert window[0] == window[1]


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, steps in RESUMED.items() for step in steps])
def test_resumed_after_a_roll_back_it_is_the_unbroken_run_and_skips_the_same(name, step):
    for rank in of_layout(name):
        actual, expected = rank[f"resumed at {step}"], rank["rolled back"]
        assert_same_arrays(actual["arrays"], expected["arrays"])
        assert {key: actual[key] for key in ("counts", "judge", "loss")} == {
            key: expected[key] for key in ("counts", "judge", "loss")
        }


@pytest.mark.parametrize("name", NAMES)
def test_no_sample_is_seen_twice_and_the_skipped_ones_are_counted(name):
    for rank in of_layout(name):
        found, batch = rank["rolled back"], rank["batch"]
        num_attempts = FAULTY_STEP + NUM_STEPS - ROLLED_BACK_TO
        assert found["starts"] == [number * batch for number in range(num_attempts)]
        assert found["counts"] == (NUM_STEPS, num_attempts * batch, 0)
        skipped = (FAULTY_STEP - ROLLED_BACK_TO) * batch
        assert found["judge"]["roll_backs"] == [
            {"step": FAULTY_STEP, "to_step": ROLLED_BACK_TO, "skipped_samples": skipped}
        ]
        assert found["counts"][1] - skipped == NUM_STEPS * batch  # what the weights have learned from


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_tell_the_same(name):
    first, *others = (rank["rolled back"]["events"] for rank in of_layout(name))
    kinds = [(kind, details["step"]) for kind, _, details in first]
    assert kinds == [("spike", FAULTY_STEP), ("roll_back", FAULTY_STEP)]
    assert all(str(events) == str(first) for events in others)
