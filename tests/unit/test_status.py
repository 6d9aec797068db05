"""`megamoe status`: what it says of a run's state, and in how little time and room."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.report.facts import STATES
from megamoe.report.status import read_glance, sparkline, status_text
from tests.unit.report_cases import CONFIG, HOSTILE, START, metrics, write_lines, write_run

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def with_events(folder: Path, *events: dict, last_step: int = 40, age_seconds: float = 0.0) -> Path:
    """A run whose files were last written `age_seconds` ago."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    write_lines(folder / "metrics.jsonl", metrics(last_step))
    now = time.time()
    timed = [{"time": now - age_seconds - 100 + place, **event} for place, event in enumerate(events)]
    write_lines(folder / "events.jsonl", timed)
    os.utime(folder / "metrics.jsonl", (now - age_seconds,) * 2)
    return folder


START_EVENT = {"kind": "start", "step": 0, "world_size": 16, "hosts": ["a", "b"], "attempt": 1}


@pytest.mark.parametrize(
    ("events", "age_seconds", "state"),
    [
        ([START_EVENT], 1, "running"),
        ([START_EVENT], 80, "running"),  # ten steps of 2.2 s are between two lines: four times that is patience
        ([START_EVENT], 200, "stale"),
        ([START_EVENT, {"kind": "save", "step": 40}], 2000, "stale"),
        ([START_EVENT, {"kind": "end", "step": 6000}], 2000, "finished"),
        ([START_EVENT, {"kind": "interrupted", "step": 40}], 1, "interrupted"),
        ([START_EVENT, {"kind": "hang", "step": 40}], 1, "hung"),
        ([START_EVENT, {"kind": "stopped", "step": 40}], 1, "stopped"),
        ([START_EVENT, {"kind": "failed", "step": 40}], 1, "failed"),
        ([START_EVENT, {"kind": "hang", "step": 40}, {"kind": "failed", "step": 40}], 1, "hung"),
        ([START_EVENT, {"kind": "failed", "step": 40}, {"kind": "requeue"}], 1, "requeued"),
        ([START_EVENT, {"kind": "failed", "step": 40}, {"kind": "give_up"}], 1, "gave up"),
        ([START_EVENT, {"kind": "failed", "step": 40}, START_EVENT | {"step": 30, "attempt": 2}], 1, "running"),
    ],
)
def test_states(tmp_path, capsys, events, age_seconds, state):
    run = with_events(tmp_path / "run", *events, age_seconds=age_seconds)
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == state
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"run: {STATES[state]}")


def test_what_is_told(tmp_path, capsys):
    run = write_run(tmp_path / "run", last_step=4200, ended=False)
    checkpoint = run / "checkpoints" / "step_00004000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (run / "checkpoints" / "latest").write_text("step_00004000\n")
    now = time.time()
    os.utime(checkpoint / "manifest.json", (now - 600, now - 600))
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    last = [line for line in metrics(4200) if "loss" in line][-1]
    assert told["training"] == last and told["step"] == 4200 and told["num_steps"] == 6000
    assert told["tokens"] == 4200 * 256 * 1024 and told["num_tokens"] == 6000 * 256 * 1024
    assert told["seconds_left"] == pytest.approx(1800 * last["step_seconds"])
    assert told["checkpoint_step"] == 4000 and told["checkpoint_age_seconds"] == pytest.approx(600, abs=30)
    assert (told["num_attempts"], told["num_restarts"], told["lost_steps"]) == (2, 1, 130)
    assert told["validation"]["step"] == 4000 and told["num_ranks"] == 16 and told["num_hosts"] == 2
    assert len(told["events"]) == 10
    text = status_text(read_glance(run), 100)
    for part in ("70.0%", "step 4,200 of 6,000", "1.1 B of 1.57 B", "step 4,000, 10 min old", "2, 1 restart, 130 steps",
                 f"{last['flops_utilization']:.1%}", "validation loss", "after step 4,000", "▁", "█"):  # fmt: skip
        assert part in text, part


def test_dead_and_hot_experts_are_named(tmp_path):
    run = with_events(tmp_path / "run", START_EVENT)
    rows = {"1": [10, 0, 10, 10], "3": [10, 10, 10, 90], "5": [0, 0, 0, 0], "7": ["x"], "x": 3}
    write_lines(run / "expert_loads.jsonl", [{"step": 40, "layers": rows}])
    text = status_text(read_glance(run), 100)
    assert "no tokens        layer/expert 1/1\n" in text and "hot              layer/expert 3/3 3.0x\n" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("name", ["run", "a" * 36, "a" * 90])
def test_lines_fit_the_terminal_and_hold_no_escapes_of_files(tmp_path, width, colour, name):
    run = with_events(tmp_path / name, START_EVENT, {"kind": "failed", "message": HOSTILE * 5}, {"kind": HOSTILE})
    text = status_text(read_glance(run), width, colour=colour)
    plain = ESCAPE.sub("", text)
    assert all(len(line) <= width for line in plain.splitlines()) and "\x1b" not in plain
    assert text.count("\x1b[0m") == text.count("\x1b[1;") <= int(colour), "what begins a colour ends it"
    assert name != "run" or (text != plain) == colour


def test_without_unicode_there_is_none(tmp_path):
    run = write_run(tmp_path / "run", last_step=500)
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", "status", str(run)], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout.isascii() and "#" in done.stdout and "\x1b" not in done.stdout


def test_sparklines():
    assert sparkline([1.0, 2.0, 3.0, None], 8, True) == "▁▅█"
    assert sparkline([5.0] * 20, 10, True) == "▁" * 10
    assert sparkline([1.0, 2.0], 8, True) == "" and sparkline([1.0, 2.0, 3.0], 8, False) == ""
    assert sparkline([0.0] * 10 + [1.0] * 10, 4, True) == "▁▁██"


def test_infinities_of_a_file_stay_out_of_the_json(tmp_path, capsys):
    run = with_events(tmp_path / "run", START_EVENT)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "loss": 1e999, "step_seconds": 2.0, "nonfinite": ["lm_loss"], "lm_loss": null}\n')
    assert main(["status", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["step"] == 50 and told["training"]["loss"] is None
    assert "language loss    not finite" in status_text(read_glance(run), 100)


def test_following_ends_with_the_run(tmp_path):
    run = with_events(tmp_path / "run", START_EVENT)
    command = [sys.executable, "-m", "megamoe", "status", str(run), "--follow", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = json.loads(process.stdout.readline())
        with open(run / "events.jsonl", "a") as file:
            file.write(json.dumps({"time": time.time(), "kind": "end", "step": 6000, "message": "done"}) + "\n")
        rest, _ = process.communicate(timeout=30)
    assert first["state"] == "running" and json.loads(rest.splitlines()[-1])["state"] == "finished"
    assert process.returncode == 0


def test_it_answers_at_once_however_long_the_run(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "r+b") as file:
        lines = file.read()
        for _ in range(20):
            file.write(lines)
    command = [sys.executable, "-X", "importtime", "-m", "megamoe", "status", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "yaml" in loaded and not {"torch", "matplotlib", "pydantic.main"} & loaded
    started = os.times()
    read_glance(run)
    ended = os.times()
    assert ended.user + ended.system - started.user - started.system < 0.5


def test_old_runs_are_told_as_far_as_they_tell(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", metrics(100, with_time=False))
    (tmp_path / "config.yaml").write_text(CONFIG.replace("6000", "100") + "gone: {key: 1}\n")
    glance = read_glance(tmp_path, now=START)
    assert glance.facts.state == "finished" and glance.facts.step == 100
    (tmp_path / "config.yaml").write_text("a: &a [1]\nrun: {num_steps: *a}\n")
    assert read_glance(tmp_path).facts.num_steps is None
