"""kill -9 of a rank at named points of a step and of a save: the restart goes on from the newest complete save, and
the run that was killed again and again ends as the one that never was, to the bit.

One folder is taken through all kills in a row, each launch resuming from what the last one left.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megamoe.checkpoint import faults
from megamoe.checkpoint.commit import recover
from megamoe.model.random import random_state
from megamoe.runs.run_folder import checkpoints_path, resumable_checkpoints, step_of
from megamoe.training.build import Trainer
from megamoe.training.host_copy import HostCopy
from megamoe.training.restore import load_newest
from megamoe.training.saving import CheckpointSaver
from tests.harness import RanksFailed, run_ranks
from tests.parallel.checkpoint_cases import THOROUGH
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

WORLD = 2
SETTINGS = (*parallel(ep=2, zero=1), "model.hidden_dropout=0.2", "moe.input_jitter=0.1", "run.num_steps=1000")
SEED = 4711
STEP_POINTS = ("forward", "backward-done", "update", "step-done", "copied", "polled")
COMMIT_ONLY = faults.POINTS.index("commit-started")
NOT_REACHED = {"aside-renamed"}  # no step is saved twice here
STEPS_A_LAUNCH = 3


def kills() -> list[tuple[int, str, int]]:
    """(rank, point, how many times it is passed before): some of each sort in CI, every one with the flag."""
    draw = random.Random(SEED)
    step = [(rank, point, times) for rank in range(WORLD) for point in STEP_POINTS for times in (0, 1)]
    rank_points = [(rank, point, rank) for rank in range(WORLD) for point in faults.POINTS[:COMMIT_ONLY]]
    points = [point for point in faults.POINTS[COMMIT_ONLY:] if point not in NOT_REACHED]
    commit_points = [(0, point, number % 2) for number, point in enumerate(points)]
    if THOROUGH:
        return [*step, *rank_points, *commit_points]
    return [*draw.sample(step, 4), *draw.sample(rank_points, 3), *draw.sample(commit_points, 5)]


class Killer:
    """Ends this process the hard way when its point is reached for the given time."""

    def __init__(self, kill: tuple[int, str, int] | None) -> None:
        self.kill, self.passed = kill, 0

    def reach(self, point: str) -> None:
        if self.kill is None or (dist.get_rank(), point) != self.kill[:2]:
            return
        if self.passed == self.kill[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def around(self, owner: Any, name: str, *, before: str | None = None, after: str | None = None) -> None:
        usual: Callable = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if before:
                self.reach(before)
            value = usual(*args, **kwargs)
            if after:
                self.reach(after)
            return value

        setattr(owner, name, watched)


def launch(root: str, kill: tuple[int, str, int] | None, until: int) -> dict[str, Any]:
    """Resume, then train and save every step until `until`; or die on the way."""
    settings, killer = config("bias", SETTINGS), Killer(kill)
    with trainer_of(settings) as trainer:
        if dist.get_rank() == 0:
            recover(checkpoints_path(root))
        dist.barrier()
        folders = resumable_checkpoints(root)
        loaded = load_newest(trainer, folders, on_damage="stop") if folders else None
        began = trainer.step
        killer.around(trainer.schedule, "losses", before="forward", after="backward-done")
        killer.around(trainer.engine.finalizer, "finalize", after="update")
        killer.around(HostCopy, "take", after="copied")
        faults.set_callback(killer.reach)
        saver = CheckpointSaver(trainer, root, print)
        saver.settings = saver.settings.model_copy(update={"save_timeout_seconds": 20.0})
        batches = samples(settings, until)
        while trainer.step < until:
            steps(trainer, batches[trainer.step : trainer.step + 1])
            killer.reach("step-done")
            saver.poll()
            killer.reach("polled")
            saver.save()
        saver.wait()
        assert loaded is None or loaded.notes == ()
        return {"began": began, "failure": saver.last_failure, "state": state_of(trainer)}


def state_of(trainer: Trainer) -> dict[str, Any]:
    arrays = {f"bias.{layer}": bias.numpy().copy() for layer, bias in trainer.balance_bias.by_layer.items()}
    arrays |= {name: state.numpy() for name, state in random_state().items()}
    return arrays | weights(trainer) | optimizer_state(trainer)


def newest_step(root: Path) -> int:
    found = resumable_checkpoints(root)
    return step_of(found[0].name) if found else 0


@pytest.mark.timeout(3000 if THOROUGH else 300)
def test_killed_runs_end_as_the_one_that_was_not(tmp_path):
    root, num_killed, num_lost, slowest = tmp_path / "killed", 0, 0, 0.0
    plan = kills()
    print(f"kill points from seed {SEED}: {plan}")
    for kill in plan:
        before, began = newest_step(root), time.monotonic()
        with pytest.raises(RanksFailed) as error:  # or the point was not reached
            run_ranks(launch, WORLD, str(root), kill, before + STEPS_A_LAUNCH, init=False,
                      timeout_seconds=LAUNCH_TIMEOUT_SECONDS)  # fmt: skip
        failure = error.value.failure
        assert (failure.kind, failure.rank) == ("killed", kill[0]), (kill, failure.report)
        num_killed += 1
        slowest = max(slowest, time.monotonic() - began)
        num_lost += newest_step(root) < before
        assert newest_step(root) <= before + STEPS_A_LAUNCH
    assert num_lost == 0, "a complete save is never lost"
    last = newest_step(root) + 1
    resumed = run_ranks(launch, WORLD, str(root), None, last, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
    unbroken = run_ranks(launch, WORLD, str(tmp_path / "unbroken"), None, last, init=False,
                         timeout_seconds=LAUNCH_TIMEOUT_SECONDS)  # fmt: skip
    for actual, expected in zip(resumed, unbroken, strict=True):
        assert actual["failure"] is None and actual["began"] == last - 1 and expected["began"] == 0
        assert_same_arrays(actual["state"], expected["state"])
    assert last > len(plan) // 3, "the killed run made its way"
    print(f"injected {len(plan)}, recovered exactly {num_killed}, lost {num_lost}; slowest launch {slowest:.1f} s")
