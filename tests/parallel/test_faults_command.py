"""Hangs and deaths through `megamoe train`: under its own launcher, and in ranks that end by themselves, as those of
torchrun and srun do."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from megamoe.config.schema import Config
from megamoe.launch.environment import node_name
from megamoe.launch.local import LocalResult
from megamoe.runs.events import read_events
from megamoe.runs.failures import first_failure, read_failures
from tests.parallel.faults import (
    END_SECONDS,
    LAUNCH_SECONDS,
    LAYOUTS,
    TIMEOUT_SECONDS,
    Fault,
    config_of,
    server_of,
    write_corpus,
)
from tests.parallel.test_signals import newest_step, ranks_of, start, wait_for_step

NUM_RANKS, LAYOUT = LAYOUTS[1]


def settings_in(folder: Path, *more: str) -> Config:
    config = config_of(write_corpus(folder / "text"), folder / "run", *LAYOUT, *more)
    (folder / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    return config


@pytest.mark.timeout(300)
def test_a_stopped_rank_ends_the_command_which_then_goes_on(tmp_path):
    settings_in(tmp_path, "run.num_steps=1000000", "watchdog.slow_timeout_seconds=60")
    path, run_dir = tmp_path / "run.yaml", tmp_path / "run"
    process = start(path, "--local-ranks", str(NUM_RANKS))
    wait_for_step(process, run_dir, 5)
    ranks = ranks_of(process)
    assert len(ranks) == NUM_RANKS
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and time.monotonic() - began < TIMEOUT_SECONDS + END_SECONDS, output
    (line,) = [line for line in output.splitlines() if "hangs" in line]
    assert line.startswith(f"megamoe: error: rank 1 on {node_name()} hangs in step ") and "Traceback" not in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks), "killed, though it was stopped"
    hang = read_events(run_dir)[-1]
    assert (hang["kind"], hang["rank"], hang["attempt"]) == ("hang", 1, 1)
    assert line.endswith(hang["message"]) and hang["message"] in (run_dir / "log.txt").read_text()

    last = newest_step(run_dir) + 2
    process = start(path, "--local-ranks", str(NUM_RANKS), f"run.num_steps={last}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and newest_step(run_dir) == last, output
    kinds = [event["kind"] for event in read_events(run_dir) if event["kind"] != "save"]
    assert kinds == ["start", "hang", "start", "end"]


def run_without_launcher(folder: Path, fault: Fault) -> tuple[LocalResult, dict[int, int]]:
    """Ranks that nobody reports for. Returns the exit codes of those that ended by themselves, too."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    payload: dict[str, Any] = {"folder": str(folder), "port": port}
    payload["fault"] = vars(fault) | {"num_steps": 1, "sprung": str(folder / "sprung")}
    result = server_of(0).run(
        "tests.parallel.fault_ranks:run_as_torchrun", payload, num_ranks=NUM_RANKS,
        captured_ranks=range(NUM_RANKS), timeout_seconds=LAUNCH_SECONDS, grace_seconds=10.0,
    )  # fmt: skip
    return result, {int(path.stem): int(path.read_text()) for path in folder.glob("*.code")}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_that_nobody_answers_for_end_themselves_when_one_is_stopped(tmp_path, rank):
    settings_in(tmp_path, "run.num_steps=9")
    result, codes = run_without_launcher(tmp_path, Fault("stop", "forward", rank))
    others = [each for each in range(NUM_RANKS) if each != rank]
    # By the verdict, but for one whose watchdog is so slow on a busy machine that the end of another is seen first.
    assert sorted(codes) == others and 4 in codes.values() and set(codes.values()) <= {1, 4}, result.outputs
    spoken = [line for output in result.outputs for line in output.splitlines() if "hangs" in line]
    place = f"rank {rank} on {node_name()} hangs in step 2 (forward)"
    first = [line for line in spoken if line.startswith(f"megamoe: error: {place}: its heartbeat has stood still")]
    assert len(first) == 1, "one line, once"
    assert len(spoken) == 1 + list(codes.values()).count(1) and all(place in line for line in spoken), spoken
    event = read_events(tmp_path / "run")[-1]
    assert (event["kind"], event["rank"], event["phase"], event["step"]) == ("hang", rank, "forward", 2)
    assert {each.rank: each.is_consequence for each in read_failures(tmp_path / "run", 1)} == {
        each: each != rank for each in range(NUM_RANKS)
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "rank"), [("kill", 0), ("kill", 1), ("raise", 2)])
def test_ranks_that_lose_another_say_in_one_line_whom(tmp_path, kind, rank):
    settings_in(tmp_path, "run.num_steps=9")
    result, codes = run_without_launcher(tmp_path, Fault(kind, "reduce", rank))
    others = [each for each in range(NUM_RANKS) if each != rank]
    assert {each: codes.get(each) for each in others} == dict.fromkeys(others, 1), result.outputs
    for each in others:
        errors = [line for line in result.outputs[each].splitlines() if "error" in line]
        assert len(errors) == 1 and "Traceback" not in result.outputs[each], result.outputs[each]
        assert f"rank {each} on {node_name()} " in errors[0] and f"rank {rank} on {node_name()} " in errors[0], errors
    first = first_failure(tmp_path / "run", 1)
    event = read_events(tmp_path / "run")[-1]
    assert (first.rank, event["kind"], event["rank"]) == (rank, "failed", rank)
    if kind == "raise":
        assert (event["phase"], event["step"], event["message"]) == ("reduce", 2, "ValueError: injected")
        assert "come_to_grief" in first.traceback and "ValueError: injected" in result.outputs[rank]
    else:
        assert first.kind == "died" and "without a word" in event["message"]
