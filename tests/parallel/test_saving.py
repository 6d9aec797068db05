"""Saves that fail, hang or are damaged: all ranks hear of it, nothing that was whole is lost, nothing passes unsaid."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megamoe.checkpoint.reader import Checkpoint
from megamoe.errors import CheckpointError
from megamoe.runs.run_folder import checkpoint_at, checkpoints_path, resumable_checkpoints
from megamoe.training import saving
from megamoe.training.build import Trainer
from megamoe.training.restore import DamagedCheckpoint, load_checkpoint, load_newest, load_weights
from megamoe.training.saving import CheckpointSaver, save_checkpoint
from tests.harness import run_ranks
from tests.parallel.checkpoint_cases import comparable, differences, whole_state
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, config, parallel, samples, steps, trainer_of

LAYOUT = parallel(ep=2, zero=1)
HANG_SECONDS = 4.0  # of a writer that is waited for less long, also on a busy machine


def settings_of(*more: str):
    return config("bias", (*LAYOUT, *more))


def run(function: Any, world: int, *args: Any) -> list[Any]:
    return run_ranks(function, world, *args, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Files of this rank cannot grow beyond a few bytes inside."""
    if dist.get_rank() != rank:
        yield
        return
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def slow_writer(rank: int, seconds: float) -> Iterator[None]:
    usual = saving.write_rank

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        usual(*args, **kwargs)

    if dist.get_rank() == rank:
        saving.write_rank = slow
    try:
        yield
    finally:
        saving.write_rank = usual


def steps_until_done(trainer: Trainer, saver: CheckpointSaver) -> int:
    """Train and poll as the loop does; how many steps until nothing is under way."""
    for number in range(1, 200):
        steps(trainer, samples(trainer.config, 1))
        saver.poll()
        if saver._save is None:
            return number
    raise AssertionError("the save never ended")


def failures(root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with trainer_of(settings_of()) as trainer:
        said: list[str] = []
        saver = CheckpointSaver(trainer, root, said.append)
        saver.prepare()
        saver.save(wait=True)
        steps(trainer, samples(trainer.config, 1))
        with full_disk(rank=1):
            saver.save()
            steps_until_done(trainer, saver)
        found["disk"] = (list(said), saver.last_failure, sorted(os.listdir(checkpoints_path(root))))
        load_checkpoint(trainer, checkpoints_path(root) / "step_00000000")
        steps(trainer, samples(trainer.config, 2))
        saver.save()
        steps_until_done(trainer, saver)
        found["recovered"] = (said[-1], saver.last_failure, sorted(os.listdir(checkpoints_path(root))))
        said.clear()
        with slow_writer(rank=1, seconds=0.6):
            saver.save()
            steps(trainer, samples(trainer.config, 1))
            saver.save()
        saver.wait()
        found["second"] = list(said)
        saver.settings = saver.settings.model_copy(update={"save_timeout_seconds": 0.3})
        saving.OVERDUE_SECONDS = 0.2
        said.clear()
        with slow_writer(rank=1, seconds=HANG_SECONDS):
            began = time.monotonic()
            saver.save()
            saver.wait()
            found["hang_seconds"] = time.monotonic() - began
            saver.save()  # the thread of rank 1 is still in there
            found["hang"] = list(said)
            time.sleep(HANG_SECONDS + 0.5)
        saver.settings = saver.settings.model_copy(update={"save_timeout_seconds": 30.0, "on_save_failure": "stop"})
        steps(trainer, samples(trainer.config, 1))
        saver.save(wait=True)
        found["after_hang"] = (saver.last_failure, len(resumable_checkpoints(root)))
        shutil.rmtree(checkpoints_path(root)) if dist.get_rank() == 0 else None
        dist.barrier()
        if dist.get_rank() == 0:
            checkpoints_path(root).write_text("in the way")
        dist.barrier()
        with pytest.raises(CheckpointError) as error:
            saver.save(wait=True)
        found["stop"] = str(error.value)
    return found


def test_failed_saves_are_told_on_all_ranks_and_lose_nothing(tmp_path):
    first, second = run(failures, 2, str(tmp_path))
    for found in (first, second):  # `say` stands for every rank's voice here: all decide the same
        said, failure, names = found["disk"]
        assert failure.startswith("the checkpoint of step 1 could not be saved: rank ") and "rank_00001" in failure
        assert said[-1] == f"{failure}; training goes on, earlier checkpoints are whole"
        assert names == ["latest", "step_00000000"], "no half-written folder"
        said, failure, names = found["recovered"]
        assert failure is None and said.startswith(f"saved {tmp_path}/checkpoints/step_00000002 in ")
        assert names == ["latest", "step_00000000", "step_00000002"]
        assert [line.split(" ")[0] for line in found["second"]] == ["saved", "waited", "saved"]
        assert 0.5 <= found["hang_seconds"] < HANG_SECONDS, "bounded, and by the setting"
        overdue, stuck = found["hang"]
        assert "could not be saved: rank " in overdue
        assert "the writer of an earlier one still hangs in the file system" in stuck
        assert found["after_hang"][0] is None and found["after_hang"][1] == 2
        assert found["stop"].endswith("(checkpoint.on_save_failure is stop)") and "checkpoints" in found["stop"]
    assert first["stop"] == second["stop"] and first["hang"] == second["hang"]


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(folder: Path, name: str) -> None:
    """One bit in the last byte of a file."""
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def damaged(root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with trainer_of(settings_of("checkpoint.keep_last=3")) as trainer:
        states, rank = [], dist.get_rank()
        for _ in range(3):
            steps(trainer, samples(trainer.config, 1))
            save_checkpoint(trainer, root)
            states.append(whole_state(trainer))
        folders = resumable_checkpoints(root)
        if rank == 0:
            flip(folders[0], "exp_avg_rank_00001.safetensors")  # read by rank 1 alone
        dist.barrier()
        with pytest.raises(DamagedCheckpoint) as error:
            load_newest(trainer, folders, on_damage="stop")
        found["stop"] = str(error.value)
        loaded = load_newest(trainer, folders, on_damage="fall_back")
        found["fallen"] = (loaded.folder.name, loaded.notes, trainer.step)
        state = whole_state(trainer)
        found["wrong"] = [] if state is None else differences(comparable(state), comparable(states[1]))
        if rank == 0:
            (folders[1] / "manifest.json").write_text("{")
            (folders[2] / "weight_rank_00000.safetensors").unlink()
        dist.barrier()
        with pytest.raises(DamagedCheckpoint) as error:
            load_newest(trainer, folders, on_damage="fall_back")
        found["all"] = str(error.value)
    return found


def test_a_damaged_newest_checkpoint_falls_back_on_all_ranks(tmp_path):
    first, second = run(damaged, 2, str(tmp_path))
    assert first["stop"] == second["stop"] and first["all"] == second["all"]
    newest = f"{tmp_path}/checkpoints/step_00000003"
    assert f"{newest}/exp_avg_rank_00001.safetensors: " in first["stop"] and "checksum" in first["stop"]
    assert first["stop"].endswith(
        f"remove {newest} to go on from the checkpoint before it (checkpoint.on_damage is stop)"
    )
    for found in (first, second):
        name, notes, step = found["fallen"]
        assert (name, step, found["wrong"]) == ("step_00000002", 2, [])
        assert len(notes) == 1 and notes[0].startswith(f"damaged and passed over: {newest}/exp_avg_rank_00001")
    for part in ("exp_avg_rank_00001", "step_00000002/manifest.json", "step_00000001/weight_rank_00000.safetensors"):
        assert part in first["all"]
    assert first["all"].startswith("no checkpoint is whole: ") and "checkpoint.resume false" in first["all"]


# --- what may differ -------------------------------------------------------------------------------------------------


def other_settings(root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with trainer_of(settings_of()) as trainer:
        steps(trainer, samples(trainer.config, 2))
        good = save_checkpoint(trainer, root)
        expected = whole_state(trainer)
    for name, setting in {
        "model": "model.ffn_hidden_size=32", "optimizer": "optimizer.name=sgd", "changed": "optimizer.lr=0.25",
        "no_bias": "moe.balance_bias_update_rate=0", "sampled": "checkpoint.verify=sampled",
    }.items():  # fmt: skip
        with trainer_of(settings_of(setting)) as trainer:
            try:
                found[name] = load_checkpoint(trainer, good).notes
            except CheckpointError as error:
                found[name] = f"{type(error).__name__}: {error}"
    with trainer_of(settings_of("optimizer.name=sgd", "parallel.expert_parallel_size=1")) as trainer:
        fresh = optimizer_moments(trainer)
        loaded = load_weights(trainer, checkpoint_at(root))
        found["finetune"] = (loaded.folder.name, loaded.is_whole, trainer.step, trainer.samples, loaded.notes)
        assert optimizer_moments(trainer) == fresh == 0.0
        steps(trainer, samples(trainer.config, 1))
    with trainer_of(settings_of("run.precision=bf16", "parallel.zero_stage=2")) as trainer:
        load_weights(trainer, checkpoint_at(str(good)))
        state = whole_state(trainer)
        if state is not None:
            masters = {("weight", name): v for (kind, name), v in state.items() if kind == "master"}
            weights = {key: v for key, v in expected.items() if key[0] == "weight"}
            found["finetune_wrong"] = differences(masters, weights)
            found["finetune_moments"] = any(v.any() for (kind, _), v in state.items() if kind.startswith("exp_avg"))
            found["finetune_bias"] = [
                differences({key: v}, {key: expected[key]}) for key, v in state.items() if key[0] == "balance_bias"
            ]
    with pytest.raises(CheckpointError) as error:
        checkpoint_at(f"{root}/nowhere")
    found["nowhere"] = str(error.value)
    return found


def optimizer_moments(trainer: Trainer) -> float:
    state = trainer.engine.basic_optimizer.state.values()
    return sum(float(t.abs().sum()) for each in state for name, t in each.items() if name != "step" and t is not None)


def test_what_may_differ_is_told_and_what_may_not_is_refused(tmp_path):
    found, _ = run(other_settings, 2, str(tmp_path))
    good = f"{tmp_path}/checkpoints/step_00000002"
    assert found["model"] == (
        f"CheckpointError: {good} holds another model (model.ffn_hidden_size 64 there, 32 here): resume with that "
        "model, choose another run.dir, or set checkpoint.resume false"
    )
    assert found["optimizer"].startswith(
        f"CheckpointError: {good} holds the state of another training (optimizer.name adamw there, sgd here)"
    )
    assert found["changed"] == ("optimizer.lr 0.005 there, 0.25 here",)
    assert found["no_bias"] == ("moe.balance_bias_update_rate 0.01 there, 0.0 here",)
    assert found["sampled"] == ()
    name, is_whole, step, consumed, notes = found["finetune"]
    assert (name, is_whole, step, consumed) == ("step_00000002", False, 0, 0)
    assert "parallel.expert_parallel_size 2 there, 1 here" in notes
    assert found["finetune_wrong"] == [] and not found["finetune_moments"]
    assert found["finetune_bias"] and not any(found["finetune_bias"])
    assert found["nowhere"].startswith(f"checkpoint.load_from {tmp_path}/nowhere holds no checkpoint")


# --- the folder ------------------------------------------------------------------------------------------------------


def folders_of_a_run(root: str) -> dict[str, Any]:
    """Saves of one rank, with debris in between, and what the folder held after each."""
    settings, seen = config("bias", (*parallel(zero=1), "checkpoint.keep_last=2", "checkpoint.keep_every_steps=2")), {}
    checkpoints = checkpoints_path(root)
    with trainer_of(settings) as trainer:
        for number in range(1, 6):
            steps(trainer, samples(settings, 1))
            if number == 3:  # a crash in the middle of a save, of this step and of another
                for name in (".step_00000003.0123-1.partial", ".step_00000009.0123-2.partial"):
                    (checkpoints / name).mkdir()
                    (checkpoints / name / "weight_rank_00000.safetensors").write_bytes(b"half")
                seen["in_force_beside_debris"] = [path.name for path in resumable_checkpoints(root)]
            save_checkpoint(trainer, root)
            seen[number] = sorted(os.listdir(checkpoints)), resumable_checkpoints(root)[0].name
        # Back to step 2 by hand, as `latest` invites to; the abandoned steps must not push out what is new.
        (checkpoints / "latest").write_text("step_00000002\n")
        (folder,) = resumable_checkpoints(root)
        load_checkpoint(trainer, folder)
        steps(trainer, samples(settings, 1))
        save_checkpoint(trainer, root)
        seen["rolled_back"] = [path.name for path in resumable_checkpoints(root)]
        with Checkpoint.open(checkpoints / "step_00000003") as again:
            seen["state"] = again.manifest.state
    return seen


def test_debris_is_ignored_then_cleaned_and_old_checkpoints_go(tmp_path):
    (seen,) = run(folders_of_a_run, 1, str(tmp_path))
    assert seen["in_force_beside_debris"] == ["step_00000002", "step_00000001"]
    kept = {1: (1,), 2: (1, 2), 3: (2, 3), 4: (2, 3, 4), 5: (2, 4, 5)}
    for number, numbers in kept.items():
        names = [f"step_{step:08d}" for step in numbers]
        assert seen[number] == (["latest", *names], names[-1])
    assert seen["rolled_back"] == ["step_00000003", "step_00000002"]
    state = seen["state"]
    assert (state["step"], state["samples"], state["tokens"], state["optimizer_steps"]) == (3, 24, 24 * 16, 3)
