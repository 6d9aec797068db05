"""What a run folder tells of spikes, roll backs and the stop file, through `run_rank`."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megamoe.checkpoint.reader import Checkpoint
from megamoe.config.schema import Config
from megamoe.errors import MegamoeError
from megamoe.launch.environment import rank_environment
from megamoe.runs.events import read_events
from megamoe.runs.metrics import read_metrics
from megamoe.runs.run_folder import resumable_checkpoints
from megamoe.training.groups import destroy_groups
from megamoe.training.main import run_rank
from megamoe.training.spikes import SpikeJudge
from tests.harness import run_ranks
from tests.parallel.test_run import config_of, corpus  # noqa: F401 (a fixture)
from tests.parallel.test_signals import MANY_STEPS, newest_step
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS

GUARD = (
    "guard.judge_after_steps=0", "guard.window_steps=8", "guard.min_window_steps=8", "guard.divergence_steps=8",
    "guard.divergence_rise=50", "guard.guessing_margin=50", "guard.min_rise=5", "guard.threshold=1",
    "checkpoint.save_interval_steps=5", "checkpoint.keep_last=9", "run.batch_size_ramp=null", "run.num_steps=16",
    "checkpoint.async_save=false", "monitor.sample_prompt=null", "run.eval_interval_steps=5",
)  # fmt: skip
SPIKE = 20.0  # nats on top of the loss
# name -> at which steps that are taken, undone ones counted, the judge sees a spike; settings
RUNS: dict[str, tuple[Callable[[int], bool], tuple[str, ...]]] = {
    "rolled_back": (lambda number: number == 13, ("guard.action=roll_back",)),
    "warned": (lambda number: number in (10, 11, 13), ("guard.action=warn",)),
    "again": (lambda number: number >= 13, ("guard.action=roll_back", "guard.max_roll_backs=2")),
    "seldom": (
        lambda number: number in (11, 17), ("guard.action=roll_back", "guard.max_roll_backs=1",
                                            "guard.roll_back_window_steps=2")),
    "too_early": (lambda number: number == 9, ("guard.action=roll_back", "checkpoint.save_interval_steps=10")),
    "far": (lambda number: number == 13, ("guard.action=roll_back", "guard.min_roll_back_steps=4")),
    "stopped": (lambda number: number == 9, ("guard.action=stop",)),
    "only_skips": (lambda number: number >= 9, ("guard.action=skip", "run.max_skipped_steps=3")),
    "disabled": (lambda number: number == 9, ("guard.action=disabled",)),
}  # fmt: skip


def train(payload: list[tuple[str, dict[str, Any]]]) -> dict[str, tuple[int, str]]:
    """Each run, with its spikes; how it ended: exit code and message."""
    rendezvous, ends = rank_environment().init_method, {}
    usual = SpikeJudge.refuses
    for name, config in payload:
        os.environ["MEGAMOE_INIT_METHOD"], calls = f"{rendezvous}.{name}", [0]

        def refuses(judge: Any, step: int, loss: float, norm: float, calls=calls, name=name) -> bool:
            calls[0] += 1
            return usual(judge, step, loss + SPIKE * RUNS[name][0](calls[0]), norm)

        SpikeJudge.refuses = refuses
        ends[name] = (0, "")
        try:
            run_rank({"config": config})
        except MegamoeError as error:
            ends[name] = (error.exit_code, str(error))
            leave()
    return ends


def leave() -> None:
    """A run that failed leaves its world standing: here another one follows in the same process."""
    if dist.is_initialized():
        destroy_groups()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, tuple[int, str]]]:  # noqa: F811
    root = tmp_path_factory.mktemp("guarded")
    settings = {name: config_of(corpus, root / name, *GUARD, *more) for name, (_, more) in RUNS.items()}
    ends = {}
    for world, names in ((2, ["rolled_back"]), (1, list(RUNS)[1:])):
        payload = [(name, settings[name].model_dump(mode="json")) for name in names]
        on_ranks = run_ranks(train, world, payload, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
        assert all(each == on_ranks[0] for each in on_ranks)
        ends |= on_ranks[0]
    return {name: (settings[name], ends[name]) for name in RUNS}


def told(settings: Config) -> list[dict[str, Any]]:
    return [event for event in read_events(settings.run.dir) if event["kind"] in ("spike", "divergence", "roll_back")]


def steps_of(settings: Config, key: str = "loss") -> list[int]:
    return [line["step"] for line in read_metrics(Path(settings.run.dir) / "metrics.jsonl") if key in line]


def state_of(settings: Config) -> dict[str, Any]:
    with Checkpoint.open(resumable_checkpoints(settings.run.dir)[0]) as checkpoint:
        return checkpoint.manifest.state


def test_a_roll_back_is_told_everywhere_and_its_steps_stand_there_once(runs):
    settings, end = runs["rolled_back"]
    folder = Path(settings.run.dir)
    assert end == (0, "")
    spike, roll_back = told(settings)
    assert (spike["kind"], spike["step"], spike["action"]) == ("spike", 13, "roll_back")
    assert spike["loss"] > spike["expected"] + 15 and spike["grad_norm"] > 0
    assert {key: roll_back[key] for key in ("kind", "step", "to_step", "skipped_samples")} == {
        "kind": "roll_back", "step": 13, "to_step": 10, "skipped_samples": 24
    }  # fmt: skip
    assert roll_back["message"] == (
        f"went back from step 13 to {folder}/checkpoints/step_00000010; 24 samples are skipped, training goes on "
        "behind sample 104"
    )
    log = (folder / "log.txt").read_text()
    assert log.count(spike["message"]) == log.count(roll_back["message"]) == 1
    assert log.count("step 12/16") == 2  # the log is history, the metrics are the run that counts
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert [line["samples"] for line in lines] == [8 * step + 24 * (step > 10) for step in range(1, 17)]
    assert [line["rolled_back_steps"] for line in lines] == [0] * 10 + [3] * 6
    assert [line["spikes"] for line in lines] == [0] * 10 + [1] * 6
    assert all(line["global_batch_size"] == 8 for line in lines)
    assert steps_of(settings, "valid_loss") == [5, 10, 15, 16]
    assert state_of(settings)["samples"] == 16 * 8 + 24


def test_a_warning_changes_nothing_but_what_is_told(runs):
    settings, end = runs["warned"]
    assert end == (0, "") and [(event["kind"], event["step"]) for event in told(settings)] == [
        ("spike", 10), ("spike", 13)
    ]  # fmt: skip
    assert told(settings)[0]["message"].endswith("; training goes on")
    assert state_of(settings)["skipped_steps"] == 0


def test_too_many_roll_backs_stop_the_run(runs):
    settings, (code, message) = runs["again"]
    assert code == 3 and "training has gone back 2 times within 1000 steps (guard.max_roll_backs)" in message
    kinds = [(event["kind"], event["step"]) for event in told(settings)]
    assert kinds == [("spike", 13), ("roll_back", 13), ("spike", 11), ("roll_back", 11), ("spike", 11)]
    state = state_of(settings)
    assert (state["step"], state["samples"], len(state["guard"]["roll_backs"])) == (10, 14 * 8, 2)


def test_roll_backs_far_apart_do_not_add_up(runs):
    settings, end = runs["seldom"]
    assert end == (0, "")
    assert [event["step"] for event in told(settings) if event["kind"] == "roll_back"] == [11, 16]


def test_without_a_checkpoint_to_go_back_to_the_step_is_skipped(runs):
    settings, end = runs["too_early"]
    assert end == (0, "")
    (spike,) = told(settings)
    assert spike["message"].endswith("; there is no checkpoint to go back to; the step is skipped")
    assert state_of(settings)["skipped_steps"] == 1


def test_the_checkpoint_is_as_old_as_asked_for(runs):
    settings, end = runs["far"]
    assert end == (0, "") and [(event["step"], event["to_step"]) for event in told(settings)[1:]] == [(13, 5)]
    assert steps_of(settings) == list(range(1, 17))


def test_stop_ends_the_run_with_its_own_code(runs):
    settings, (code, message) = runs["stopped"]
    assert code == 3 and message.startswith("step 9: the loss is ") and "(guard.action)" in message
    assert steps_of(settings)[-1] == 8 and [event["action"] for event in told(settings)] == ["stop"]


def test_skips_in_a_row_end_at_their_limit(runs):
    _, (code, message) = runs["only_skips"]
    assert code == 3
    assert message.startswith("the gradient was not finite or refused by the guard in 3 steps in a row, up to step 11 ")


def test_disabled_it_says_and_keeps_nothing(runs):
    settings, end = runs["disabled"]
    assert end == (0, "") and told(settings) == [] and state_of(settings)["guard"] is None
    lines = read_metrics(Path(settings.run.dir) / "metrics.jsonl")
    assert not {"spikes", "rolled_back_steps"} & {key for line in lines for key in line}


def stop_and_start(run_dir: str, settings: dict[str, Any]) -> list[tuple[int, str]]:
    """A run that somebody stops by the file, a start while it lies there, and one without it; how each ended."""
    rendezvous, ends, path = rank_environment().init_method, [], Path(run_dir) / "stop"
    is_first = rank_environment().rank == 0

    def touch() -> None:
        while newest_step(Path(run_dir)) < 3:
            time.sleep(0.05)
        path.touch()

    for number in range(3):
        os.environ["MEGAMOE_INIT_METHOD"] = f"{rendezvous}.{number}"
        if is_first and number == 0:
            threading.Thread(target=touch, daemon=True).start()
        elif number == 1:
            settings = settings | {"run": settings["run"] | {"num_steps": newest_step(Path(run_dir)) + 2}}
            path.touch()
        elif number == 2:
            path.unlink(missing_ok=True)
        try:
            run_rank({"config": settings})
            ends.append((0, ""))
        except MegamoeError as error:
            ends.append((error.exit_code, str(error)))
            leave()
    return ends


def test_the_stop_file_saves_and_ends_the_run_once(corpus, tmp_path):  # noqa: F811
    run_dir = tmp_path / "run"
    settings = config_of(
        corpus, run_dir, f"run.num_steps={MANY_STEPS}", "run.eval_interval_steps=0", "checkpoint.save_interval_steps=0"
    )
    ends, other = run_ranks(
        stop_and_start, 2, str(run_dir), settings.model_dump(mode="json"), init=False,
        timeout_seconds=LAUNCH_TIMEOUT_SECONDS,
    )  # fmt: skip
    assert ends == other
    (event,) = (event for event in read_events(run_dir) if event["kind"] == "interrupted")
    step = event["step"]
    assert step >= 3 and event["reason"] == "stop file"
    assert ends == [
        (75, f"stopped by a stop file after step {step}, whose checkpoint is in {run_dir}/checkpoints: the same "
             "command goes on from there"),
        (2, f"{run_dir}/stop asks this run not to train: remove that file to start it"),
        (0, ""),
    ]  # fmt: skip
    assert (run_dir / "stop.done").exists() and not (run_dir / "stop").exists()
    assert f"resumed at step {step} of {step + 2}" in (run_dir / "log.txt").read_text()
    assert steps_of(settings) == list(range(1, step + 3))
