"""How a study starts its commands and reads what they left: signals, last words, costs by step, results that count."""

import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from megamoe.errors import OutputError, TrainingInterrupted
from megamoe.runs.events import append_event
from megamoe.study import processes, scoring
from megamoe.study.processes import last_message, run_command
from megamoe.study.scoring import collect_points
from megamoe.study.states import Cost, costs_of, is_trained, last_line, reached_step
from tests.unit.study_cases import TINY_STUDY, load_tiny

OBEYS = "import signal, sys, time; signal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(75))); " \
        "print('ready', flush=True); time.sleep(60)"  # fmt: skip
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(TINY_STUDY)
    return load_tiny(tmp_path)[1]


def interrupt_when_ready(log, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("program", "words"), [(OBEYS, "ready\nsaved\n"), (STUBBORN, "ready\n")])
def test_a_wish_to_stop_is_passed_on_and_bounded(tmp_path, monkeypatch, program, words):
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", program))
    log, started = tmp_path / "logs" / "x.log", time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt_when_ready, args=(log,)).start()
    with pytest.raises(TrainingInterrupted, match="the same command goes on from there"):
        run_command([], log, poll=lambda: None, stop_seconds=1.0)
    assert log.read_text() == words and time.monotonic() - started < 20
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_ends_tells_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)"))
    polls = []
    ended = run_command(["a", "b"], tmp_path / "x.log", poll=lambda: polls.append(1), stop_seconds=1.0)
    assert ended == (7, "['a', 'b']")
    assert (tmp_path / "x.log").read_text() == "['a', 'b']\n"


@pytest.mark.parametrize("said", ["Killed", "", "megamoe: warning: slow\nKilled", "megamoe: note: small\nKilled"])
def test_the_reason_of_a_command_is_none_of_an_earlier_one(tmp_path, monkeypatch, said):
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", f"print({said!r}); exit(1)"))
    (tmp_path / "x.log").write_text("megamoe: error: the disk is full\n")
    expected = "Killed" if said else "it has said nothing"
    assert run_command([], tmp_path / "x.log", poll=lambda: None, stop_seconds=1.0) == (1, expected)


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", ""))
    (tmp_path / "logs").touch()
    with pytest.raises(OutputError) as refused:
        run_command([], tmp_path / "logs" / "x.log", poll=lambda: None, stop_seconds=1.0)
    log = tmp_path / "logs" / "x.log"
    assert str(refused.value) == f"{log} cannot be written (File exists): choose another folder with --out"
    (tmp_path / "x.log").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        run_command([], tmp_path / "x.log", poll=lambda: None, stop_seconds=1.0)
    monkeypatch.setattr(processes, "COMMAND", (str(tmp_path / "nothing"),))
    with pytest.raises(OutputError, match="nothing cannot be started"):
        run_command([], tmp_path / "y.log", poll=lambda: None, stop_seconds=1.0)


def test_the_last_words_are_those_of_the_error(tmp_path):
    log = tmp_path / "x.log"
    assert last_message(log) == "it has said nothing"
    log.write_text("step 1\nmegamoe: error: the disk is full\nrank 0 ended\n\n")
    assert last_message(log) == "megamoe: error: the disk is full"
    log.write_text("step 1\nKilled\n")
    assert last_message(log) == "Killed"


def test_costs_are_added_up_to_each_step(runs):
    """Lines every three steps: 3 x 0.5 + 3 x 0.2 s to step 6, of which step 4 has one step of the second line."""
    run = runs[0]
    run.dir.mkdir(parents=True)
    lines = [
        {"step": 3, "step_seconds": 0.5, "memory_bytes": 100}, {"step": 4, "valid_loss": 3.0},
        {"step": 6, "step_seconds": 0.2, "memory_bytes": 300}, {"step": 8, "step_seconds": 1.0, "memory_bytes": 200},
    ]  # fmt: skip
    (run.dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 9, "ste')
    costs = costs_of(run, (3, 4, 6, 8, 9))
    assert [costs[step].seconds for step in (3, 4, 6, 8)] == pytest.approx([1.5, 1.7, 2.1, 4.1])
    assert [costs[step].peak_memory_bytes for step in (3, 4, 8)] == [100, 300, 300]
    assert costs[9].seconds is None, "the record does not reach so far"
    assert last_line(run)["step"] == 8, "the torn line is no line"
    assert costs_of(runs[1], (4,)) == {4: Cost(None, None)}


def test_a_run_that_ended_is_trained_without_its_checkpoints(runs):
    run, last = runs[0], runs[0].config.run.num_steps
    assert not is_trained(run)
    run.dir.mkdir(parents=True)
    append_event(run.dir, "end", "all steps are done", step=last - 1)
    assert not is_trained(run) and reached_step(run) == 0
    append_event(run.dir, "end", "all steps are done", step=last)
    assert is_trained(run) and reached_step(run) == last


def test_a_child_that_heard_the_signal_first_has_not_failed(tmp_path, monkeypatch):
    """As when a batch system ends all processes of a job at once: the child dies of it while the parent looks on."""
    dies = "import os, signal; os.kill(os.getppid(), 15); os.kill(os.getpid(), 15)"
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", dies))
    with pytest.raises(TrainingInterrupted, match="the same command goes on from there"):
        run_command([], tmp_path / "x.log", poll=lambda: None, stop_seconds=1.0)


def test_results_of_a_run_that_was_trained_anew_do_not_count(runs, tmp_path, monkeypatch):
    entry = {
        "name": "docs", "domain": "in_domain", "num_tokens": 100, "num_text_bytes": 400, "nats_per_token": 2.0,
        "nats_per_token_standard_error": 0.1, "bits_per_byte": 2.0 * 100 / 400 / 0.6931471805599453,
    }  # fmt: skip
    same = {"is_complete": True, "sets": [entry]}
    models = [same | {"step": step, "manifest_checksum": f"save-{step}"} for step in (4, 8)]
    results = SimpleNamespace(tree={"models": models}, is_complete=True)
    monkeypatch.setattr(scoring, "read_results", lambda path: results)
    run = runs[0]
    run.dir.mkdir(parents=True)
    both = {4: "save-4", 8: "save-8"}
    # The folder was removed and the run begun anew; it has come to step 4; it has ended, and the disk was freed.
    for saved, reached, steps in (
        (both, 8, [4, 8]), ({4: "save-4", 8: "another"}, 8, [4]), ({}, 0, []), ({}, 5, [4]), ({}, 8, [4, 8]),
    ):  # fmt: skip
        (run.dir / "metrics.jsonl").write_text(f'{{"step": {reached}, "step_seconds": 0.5}}\n' if reached else "")
        monkeypatch.setattr(scoring, "saved_checksums", lambda run, saved=saved: saved)
        points = collect_points(runs[:1], tmp_path, vocab_size=None)
        assert [point.step for point in points] == steps
    score = points[0].sets["docs"]
    nothing = entry | dict.fromkeys(("nats_per_token", "nats_per_token_standard_error", "bits_per_byte"))
    models[0]["sets"] = [entry, nothing | {"name": "more"}, entry | {"name": "else", "domain": "out_of_domain"}]
    diverged = collect_points(runs[:1], tmp_path, vocab_size=None)[0]
    assert list(diverged.sets) == ["else"], "the mean of a domain is of all its sets, or there is none"
    assert score.bits_per_byte_se == pytest.approx(0.1 * score.bits_per_byte / score.nats_per_token)
