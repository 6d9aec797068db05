"""Started again or given up: every exit code, the two limits, and which hosts are left out."""

import pytest

from megamoe.runs.attempts import read_attempts
from megamoe.runs.events import append_event, read_events
from tests.unit.attempt_cases import save_checkpoint, script  # noqa: F401 (a fixture)
from tests.unit.config_cases import checked, refused

FAILURES = [1, 3, 4, 5, 137, 143, 134, 9, 255]


def fail(script, *hosts, kind="failed", exit_code=1):  # noqa: F811
    """An attempt that reached a new checkpoint, and ended with these hosts named, first the first."""
    step = 10 * (len(read_attempts(script.run_dir)) + 1)
    script.before()
    for host in hosts:
        append_event(script.run_dir, kind, "ended", host=host, rank=0)
    save_checkpoint(script.run_dir, step)
    return script.after(exit_code)


# ---------------------------------------------------------------- exit codes


def test_a_run_that_is_done_stops_and_is_no_event(script):  # noqa: F811
    assert script.attempt(0, saves=10) == "stop done"
    assert script.kinds() == []
    assert (read_attempts(script.run_dir)[0].verdict, read_attempts(script.run_dir)[0].reason) == ("stop", "done")


@pytest.mark.parametrize("exit_code", [75, *FAILURES])
def test_what_may_go_better_is_queued_again(script, exit_code):  # noqa: F811
    assert script.attempt(exit_code) == "requeue"
    assert script.kinds() == ["requeue"]


def test_a_users_error_is_given_up(script):  # noqa: F811
    assert script.attempt(2, saves=10) == "stop the user must mend what the log says (exit code 2)"
    assert script.kinds() == ["give_up"]


def test_ctrl_c_is_a_wish(script):  # noqa: F811
    assert script.attempt(130) == "stop Ctrl-C"
    assert script.kinds() == []


def test_a_stop_file_stops_by_its_event_or_by_being_there(script):  # noqa: F811
    script.before()
    append_event(script.run_dir, "interrupted", "stopped by its stop file", step=7, reason="stop file")
    assert script.after(75) == "stop stop file"
    script.before()
    append_event(script.run_dir, "interrupted", "stopped by a signal", step=8, reason="signal")
    assert script.after(75) == "requeue"  # the earlier attempt's event is not this one's
    script.before()
    (script.run_dir / "stop").touch()
    assert script.after(75) == "stop stop file"


def test_a_stop_file_is_no_excuse_for_a_failure(script):  # noqa: F811
    script.before()
    (script.run_dir / "stop").touch()
    assert script.after(1) == "requeue"


def test_the_same_question_has_the_same_answer(script):  # noqa: F811
    script.attempt(1)
    before = (script.run_dir / "attempts.jsonl").read_bytes()
    assert script.after(0) == script.after(1) == "requeue"
    assert (script.run_dir / "attempts.jsonl").read_bytes() == before and script.kinds() == ["requeue"]


def test_an_end_without_a_start_is_an_attempt_too(script):  # noqa: F811
    assert script.after(1) == f"stop the attempt cannot be recorded in {script.run_dir} (No such file or directory)"
    script.run_dir.mkdir()
    assert script.after(1) == "requeue"
    assert [each.exit_code for each in read_attempts(script.run_dir)] == [1]


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("exit_codes", [(1, 4, 137), (75, 75, 75), (1, 75, 5)])
def test_a_loop_without_a_newer_checkpoint_ends(script, exit_codes):  # noqa: F811
    assert script.attempt(1, saves=20) == "requeue"
    assert script.attempt(exit_codes[0]) == script.attempt(exit_codes[1]) == "requeue"
    line = script.attempt(exit_codes[2])
    assert line.startswith("stop 3 attempts in a row left no checkpoint newer than step 20 (restart.max_attempts_wit")
    assert f"exit code {exit_codes[2]}" in line or "signal 9" in line
    assert script.kinds() == ["requeue"] * 3 + ["give_up"]
    assert line.removeprefix("stop ") in read_events(script.run_dir)[-1]["message"]


def test_progress_begins_the_count_anew(script):  # noqa: F811
    for saves in (None, None, 10, None, None, 20, None, None):
        assert script.attempt(1, saves=saves) == "requeue"
    assert script.attempt(1).startswith("stop 3 attempts in a row")


def test_failures_are_bounded_though_each_made_progress(script):  # noqa: F811
    script.configure(max_attempts=4, max_attempts_without_progress=2)
    assert [script.attempt(code, saves=10 * n) for n, code in enumerate((1, 75, 4, 75, 137), 1)] == ["requeue"] * 5
    assert script.attempt(3, saves=60) == (
        "stop 4 attempts failed (restart.max_attempts), the last by training stopped itself (exit code 3)"
    )


def test_preemption_never_uses_up_attempts(script):  # noqa: F811
    script.configure(max_attempts=1, max_attempts_without_progress=1)
    for number in range(1, 8):
        assert script.attempt(75, saves=number) == "requeue"
    assert script.attempt(1, saves=9).startswith("stop 1 attempts failed")


def test_who_starts_by_hand_after_a_stop_gets_a_new_count(script):  # noqa: F811
    for _ in range(2):
        assert [script.attempt(1) for _ in range(3)][:2] == ["requeue", "requeue"]
    assert [each.verdict for each in read_attempts(script.run_dir)] == ["requeue", "requeue", "stop"] * 2


def test_scripts_that_are_killed_each_time_end_the_loop_too(script):  # noqa: F811
    """SLURM queues the job of a dead node again by itself; nobody calls after-attempt then."""
    assert [script.before() for _ in range(3)] == ["1\n", "2\n", "3\n"]
    assert script.before(3) == (
        f"megamoe: error: {script.run_dir} is given up: 3 attempts in a row left no checkpoint newer than step 0 "
        "(restart.max_attempts_without_progress), the last ended by a kill of its script. Start it once more by hand "
        "to begin a new count\n"
    )
    assert script.kinds() == ["give_up"]
    assert script.before() == "4\n" and script.after(1) == "requeue"


def test_killed_scripts_count_with_the_others(script):  # noqa: F811
    script.before()
    assert script.attempt(1) == "requeue"
    assert script.attempt(75).startswith("stop 3 attempts in a row")


def test_a_killed_script_whose_run_had_saved_made_progress(script):  # noqa: F811
    for number in range(1, 6):
        script.before()
        save_checkpoint(script.run_dir, number)
    assert script.attempt(1) == "requeue"


def test_limits_are_read_from_the_runs_own_configuration(script):  # noqa: F811
    script.configure(max_attempts=2, max_attempts_without_progress=1)
    assert script.attempt(1).startswith("stop 1 attempts in a row")
    (script.run_dir / "config.yaml").write_text("restart: {max_attempts: none}")
    assert script.attempt(1) == script.attempt(1) == "requeue"


# ---------------------------------------------------------------- hosts


def test_a_host_that_preflight_found_bad_is_left_out_at_once_and_for_good(script):  # noqa: F811
    script.before()
    append_event(script.run_dir, "preflight", "found", hosts=["node1", "node2"], bad_hosts=["node2"])
    assert script.after(5) == "requeue exclude=node2"
    script.set_job("71", "node[1,3-5]")
    assert script.attempt(1, saves=10) == "requeue exclude=node2"
    assert read_events(script.run_dir)[-1]["excluded_hosts"] == ["node2"]
    assert read_attempts(script.run_dir)[-1].excluded_hosts == ("node2",)
    script.before()
    append_event(script.run_dir, "preflight", "found", bad_hosts=["node5", "node1"])
    assert script.after(5) == "requeue exclude=node2,node5,node1"


def test_what_preflight_blames_on_no_host_is_given_up(script):  # noqa: F811
    script.before()
    append_event(script.run_dir, "preflight", "found", bad_hosts=["node1"], problems=["the disk of all is full"])
    assert script.after(5) == "requeue exclude=node1"
    script.before()
    append_event(script.run_dir, "preflight", "found", bad_hosts=[], problems=["the disk of all is full"])
    assert script.after(5) == "stop preflight: the disk of all is full"
    assert script.kinds()[-1] == "give_up"
    script.before()
    append_event(script.run_dir, "preflight", "good", bad_hosts=[], problems=[])
    assert script.after(5) == "requeue"


def test_without_the_first_host_the_majority_of_the_others_counts(script):  # noqa: F811
    def unreachable(*hosts):
        script.before()
        for host in hosts:
            append_event(script.run_dir, "preflight", "alone", hosts=[host], bad_hosts=[], unreachable_host="node1")

    unreachable("node2", "node2", "node2")
    assert script.after(5) == "requeue"  # one of three
    unreachable("node2", "node4")
    append_event(script.run_dir, "preflight", "found", hosts=["node1", "node3"], bad_hosts=["node2"], problems=[])
    assert script.after(5) == "requeue exclude=node2"  # node1 was there, and speaks for the others
    script.attempt(0)
    unreachable("node2", "node4")
    assert script.after(5) == "requeue exclude=node1"


@pytest.mark.parametrize("kind", ["failed", "hang"])
def test_a_host_that_fails_first_in_two_attempts_is_left_out(script, kind):  # noqa: F811
    assert fail(script, "node3", "node1", kind=kind) == "requeue"
    assert fail(script, "node1", "node3", kind=kind) == "requeue"  # node1's first: what follows may be a consequence
    assert fail(script) == "requeue"
    assert fail(script, "node3", kind=kind) == "requeue exclude=node3"
    assert fail(script, "node4", kind=kind) == "requeue exclude=node3"


def test_what_a_user_is_to_mend_blames_no_host(script):  # noqa: F811
    for number in (1, 2):
        script.before()
        append_event(script.run_dir, "failed", "no such file", host="node3", rank=4, cause="user")
        save_checkpoint(script.run_dir, number)
        assert script.after(1) == "requeue"


def test_names_are_those_of_the_job(script):  # noqa: F811
    """A host calls itself by a longer name than SLURM does; names that the job has not are none of ours."""
    script.before()
    bad = ["node2.cluster.example", "node9", "node1,node3", "$(reboot)", "", None, 7]
    append_event(script.run_dir, "preflight", "found", bad_hosts=bad)
    assert script.after(5) == "requeue exclude=node2"


def test_no_more_hosts_are_left_out_than_allowed(script):  # noqa: F811
    script.configure(max_excluded_hosts=2)
    script.before()
    append_event(script.run_dir, "preflight", "found", bad_hosts=["node4"])
    assert script.after(5) == "requeue exclude=node4"
    script.before()
    append_event(script.run_dir, "preflight", "found", bad_hosts=["node1", "node2", "node3"])
    assert script.after(5) == "requeue exclude=node4,node1"
    script.configure(max_excluded_hosts=0)
    assert script.after(1) == "requeue exclude=node4,node1"  # what was said stands
    assert fail(script) == "requeue"


def test_after_a_stop_all_hosts_are_welcome_again(script):  # noqa: F811
    script.before()
    append_event(script.run_dir, "preflight", "found", bad_hosts=["node4"])
    assert script.after(5) == "requeue exclude=node4"
    assert script.attempt(0) == "stop done"
    assert script.attempt(1, saves=9) == "requeue"


# ---------------------------------------------------------------- settings


def test_limits_that_contradict_each_other():
    assert refused(checked, "restart.max_attempts=2") == (
        "max_attempts_without_progress 3 is above max_attempts 2: use 1 to 2"
    )
    checked("restart.max_attempts=3", "restart.max_excluded_hosts=0")
