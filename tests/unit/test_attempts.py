"""The record of attempts: what a line holds, and that torn lines, races and killed scripts do not spoil it."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.errors import ConfigError
from megamoe.runs.attempts import ATTEMPTS_FILE, begin_attempt, current_attempt, job_hosts, newest_step, read_attempts
from megamoe.runs.events import append_event, read_events
from tests.unit.attempt_cases import save_checkpoint, script  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]


def last_line(run_dir: Path) -> dict:
    return json.loads((run_dir / ATTEMPTS_FILE).read_text().splitlines()[-1])


def test_an_attempt_is_recorded_at_its_start_and_at_its_end(script, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    save_folder = script.run_dir
    save_folder.mkdir()
    save_checkpoint(save_folder, 10)
    assert script.before() == "1\n"
    begun = last_line(save_folder)
    assert time.time() - 60 < begun["started"] <= time.time()
    assert (begun["job_id"], begun["array_task"], begun["restart_count"]) == ("71", "2", 3)
    assert begun["hosts"] == ["node1", "node2", "node3", "node4"]
    assert (begun["step_before"], begun["step_after"], begun["ended"], begun["verdict"]) == (10, None, None, None)
    save_checkpoint(save_folder, 30)
    assert script.after(75) == "requeue"
    ended = last_line(save_folder)
    assert ended["ended"] >= ended["started"] == begun["started"]
    assert (ended["exit_code"], ended["step_before"], ended["step_after"], ended["verdict"]) == (75, 10, 30, "requeue")
    assert (ended["attempt"], ended["id"], ended["excluded_hosts"]) == (1, begun["id"], [])
    (event,) = read_events(save_folder)
    assert (event["kind"], event["attempt"], event["excluded_hosts"]) == ("requeue", 1, [])
    assert script.before() == "2\n"


def test_without_slurm_the_host_is_this_one(tmp_path):
    attempt = begin_attempt(tmp_path, {})
    assert attempt.hosts == (os.uname().nodename,) and attempt.job_id is attempt.restart_count is None
    assert job_hosts({"SLURM_JOB_NODELIST": "a[1-2],b"}) == ("a1", "a2", "b")
    assert job_hosts({"SLURM_JOB_NODELIST": "a[1-"}) == ()


def test_the_current_attempt_is_the_scripts_or_the_next(tmp_path):
    assert current_attempt(tmp_path / "not there", {}) == 1
    assert current_attempt(tmp_path, {"MEGAMOE_ATTEMPT": "12"}) == 12
    append_event(tmp_path, "start", "training begins", step=0)
    append_event(tmp_path, "start", "training goes on", step=5)
    assert current_attempt(tmp_path, {}) == 3
    assert begin_attempt(tmp_path, {}).attempt == 3  # also where earlier starts were by hand
    append_event(tmp_path, "start", "training goes on", step=5, attempt=3)
    assert current_attempt(tmp_path, {}) == 4
    for text in ("0", "-1", "three", "", "1\n", "9" * 30):
        with pytest.raises(ConfigError, match="set it to what `megamoe before-attempt` printed"):
            current_attempt(tmp_path, {"MEGAMOE_ATTEMPT": text})


@pytest.mark.parametrize("torn", ['{"attempt": 2, "id": "x", "sta', "[1, 2]\n", '{"attempt": 2}\n', "\0\0\0", "null"])
def test_a_torn_or_foreign_line_takes_no_other_along(tmp_path, torn):
    first = begin_attempt(tmp_path, {})
    with open(tmp_path / ATTEMPTS_FILE, "a") as file:
        file.write(torn)
    second = begin_attempt(tmp_path, {})
    assert second.attempt > first.attempt
    assert [each.id for each in read_attempts(tmp_path)] == [first.id, second.id]


def test_an_event_after_a_torn_one_is_kept(tmp_path):
    append_event(tmp_path, "start", "one")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"kind": "sa')
    append_event(tmp_path, "end", "two")
    assert [event["kind"] for event in read_events(tmp_path)] == ["start", "end"]


@pytest.mark.parametrize(
    "change", [{"attempt": 0}, {"attempt": "1"}, {"hosts": "node1"}, {"exit_code": 1.5}, {"verdict": "maybe"}]
)
def test_a_line_with_a_wrong_value_counts_as_torn(tmp_path, change):
    begun = begin_attempt(tmp_path, {})
    with open(tmp_path / ATTEMPTS_FILE, "a") as file:
        file.write(json.dumps(last_line(tmp_path) | {"step_after": 7} | change) + "\n")
    assert read_attempts(tmp_path) == [begun]


def begin_many(run_dir, writer):
    numbers = [begin_attempt(run_dir, {}).attempt for _ in range(10)]
    (run_dir / f"writer_{writer}.json").write_text(json.dumps(numbers))


def test_writers_at_the_same_time_get_numbers_of_their_own(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=begin_many, args=(tmp_path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    taken = [number for path in tmp_path.glob("writer_*.json") for number in json.loads(path.read_text())]
    assert len(taken) == 40 == len(set(taken))
    assert sorted(taken) == [each.attempt for each in read_attempts(tmp_path)]


def test_of_two_with_one_number_the_first_line_wins(tmp_path):
    mine = begin_attempt(tmp_path, {})
    with open(tmp_path / ATTEMPTS_FILE, "a") as file:
        file.write(json.dumps(last_line(tmp_path) | {"id": "other", "step_after": 9}) + "\n")
    assert read_attempts(tmp_path) == [mine]


def test_what_a_killed_attempt_reached_is_what_the_next_one_found(tmp_path):
    begin_attempt(tmp_path, {})
    save_checkpoint(tmp_path, 20)
    begin_attempt(tmp_path, {})
    first, second = read_attempts(tmp_path)
    assert (first.ended, first.verdict, first.step_before, first.step_after) == (None, None, 0, 20)
    assert (second.step_before, second.step_after) == (20, None)


def test_the_newest_step_is_of_a_checkpoint_that_is_whole(tmp_path):
    assert newest_step(tmp_path / "not there") == 0
    save_checkpoint(tmp_path, 20)
    save_checkpoint(tmp_path, 30)
    assert newest_step(tmp_path) == 30
    (tmp_path / "checkpoints" / "step_00000030" / "manifest.json").write_text("{")
    assert newest_step(tmp_path) == 20
    (tmp_path / "checkpoints" / "latest").write_text("step_00000077\n")
    assert newest_step(tmp_path) == 0


# ---------------------------------------------------------------- the commands where the folder is no good


def test_a_folder_that_cannot_be_made_is_one_sentence(script):  # noqa: F811
    script.run_dir.write_text("a file")
    assert script.before(2) == (
        f"megamoe: error: no attempt can be recorded in {script.run_dir} (File exists): make it a folder that can be "
        "written\n"
    )
    assert script.after(1) == f"stop the attempt cannot be recorded in {script.run_dir} (Not a directory)"


def test_on_a_full_disk_the_loop_ends(script):  # noqa: F811
    """What cannot be counted must not go on; the limit on the size of files stands for the disk."""
    script.before()
    size = (script.run_dir / ATTEMPTS_FILE).stat().st_size
    program = (
        "import resource, signal, sys\nfrom megamoe.cli import main\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 50}, {size + 50}))\n"
        f"sys.exit(main(['after-attempt', {str(script.run_dir)!r}, '--exit-code', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"stop the attempt cannot be recorded in {script.run_dir} (")
    assert script.after(1) == "requeue"  # once there is room again, the torn line is none


@pytest.mark.parametrize("text", ["-1", "256", "1.5", "ok", ""])
def test_an_exit_code_is_a_byte(script, text):  # noqa: F811
    with pytest.raises(SystemExit):
        script.after(text)
    assert "is no exit code: give a whole number of 0 to 255" in script.capsys.readouterr().err
