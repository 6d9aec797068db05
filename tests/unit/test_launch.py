"""The launcher: which rank is blamed, what is printed, and that nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megamoe.errors import ConfigError, TopologyError
from megamoe.launch.environment import expand_node_list, expand_tasks_per_node, rank_environment
from megamoe.launch.local import run_local

ROOT = Path(__file__).parents[2]
ENTRIES = "tests.unit.launch_entries"


def launch(entry: str, *, num_ranks: int = 3, payload: dict | None = None, **options):
    return run_local(f"{ENTRIES}:{entry}", payload or {}, num_ranks=num_ranks, **options)


def start_launcher(entry: str, folder: Path, num_ranks: int = 2) -> subprocess.Popen:
    """A launcher in a process of its own, whose ranks write their process ids into `folder`."""
    code = f"""
        import signal, sys
        from megamoe.launch.local import run_local
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
        result = run_local("{ENTRIES}:{entry}", {{"folder": {str(folder)!r}}}, num_ranks={num_ranks}, grace_seconds=2)
        assert "torch" not in sys.modules
        sys.exit(result.exit_code)
    """
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def process_ids(folder: Path, num_ranks: int = 2) -> list[int]:
    """Of the ranks, once all run."""
    wait_for(lambda: len(list(folder.glob("*.pid"))) == num_ranks)
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestEnvironment:
    TORCHRUN = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
        "MASTER_PORT": "7",
    }  # fmt: skip
    SRUN = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "9", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_STEP_NODELIST": "gpu-[03-04,11],login", "SLURM_JOB_ID": "123456",
    }  # fmt: skip

    def test_torchrun(self):
        here = rank_environment(self.TORCHRUN)
        assert (here.rank, here.world_size, here.local_rank, here.local_world_size) == (5, 8, 1, 4)
        assert (here.init_method, here.source) == ("tcp://a:7", "torchrun")
        assert here.as_variables()["LOCAL_SIZE"] == "4"

    def test_srun(self):
        here = rank_environment(self.SRUN)
        assert (here.rank, here.world_size, here.local_rank, here.local_world_size) == (5, 9, 1, 4)
        assert (here.init_method, here.source) == ("tcp://gpu-03:23456", "srun")

    def test_nodes_are_known_where_ranks_are_numbered_node_by_node(self):
        assert rank_environment(self.TORCHRUN).ranks_per_node == 4
        assert rank_environment(self.TORCHRUN | {"RANK": "2"}).ranks_per_node is None  # dealt out in turns
        assert rank_environment({}).ranks_per_node == 1

    def test_srun_keeps_the_address_that_the_user_set(self):
        here = rank_environment(self.SRUN | {"MASTER_ADDR": "fe80::1", "MASTER_PORT": "99"})
        assert here.init_method == "tcp://[fe80::1]:99"

    @pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
    def test_batch_script_outside_srun_is_one_rank(self, step):
        env = {name: value for name, value in self.SRUN.items() if name != "SLURM_STEP_ID"}
        env |= {"SLURM_PROCID": "0"} | ({"SLURM_STEP_ID": step} if step else {})
        assert rank_environment(env).source == "single"

    def test_torchrun_inside_srun_is_torchrun(self):
        assert rank_environment(self.SRUN | self.TORCHRUN).source == "torchrun"

    def test_single(self):
        here, other = rank_environment({}), rank_environment({})
        assert (here.rank, here.world_size, here.local_world_size) == (0, 1, 1)
        assert here.init_method.startswith("file:///") and here.init_method != other.init_method

    def test_half_set(self):
        env = {"RANK": "0", "WORLD_SIZE": "2"}
        with pytest.raises(TopologyError) as error:
            rank_environment(env)
        assert str(error.value) == (
            "The environment describes a rank only in part: RANK, WORLD_SIZE set, but not MASTER_ADDR, MASTER_PORT; "
            "start with torchrun, which sets them all, or unset them to run one rank."
        )

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"RANK": "8"}, "The environment variable RANK is 8: it must be between 0 and 7 here."),
            ({"RANK": "x"}, 'The environment variable RANK is "x": it must be a whole number.'),
            ({"WORLD_SIZE": "0"}, "The environment variable WORLD_SIZE is 0: it must be at least 1 here."),
            ({"LOCAL_RANK": "4"}, "The environment variable LOCAL_RANK is 4: it must be between 0 and 3 here."),
        ],
    )
    def test_wrong_values(self, changed, message):
        with pytest.raises(TopologyError) as error:
            rank_environment(self.TORCHRUN | changed)
        assert str(error.value) == message

    @pytest.mark.parametrize(
        ("short", "names"),
        [
            ("one", ["one"]),
            ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
            ("n[08-10],m,k[2]x", ["n08", "n09", "n10", "m", "k2x"]),
            ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ],
    )
    def test_node_lists(self, short, names):
        assert expand_node_list(short) == names

    @pytest.mark.parametrize("short", ["node[1-", "node]1[", "a,,b", "", "n[a-b]"])
    def test_malformed_node_lists(self, short):
        with pytest.raises(TopologyError, match="malformed"):
            expand_node_list(short)

    def test_tasks_per_node(self):
        assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
        with pytest.raises(TopologyError, match="expected counts"):
            expand_tasks_per_node("2(y3)")


class TestRanks:
    def test_environment_and_output(self, tmp_path, capfd):
        result = launch("report", num_ranks=4, payload={"folder": str(tmp_path)})
        assert result.exit_code == 0 and result.failure is None
        seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
        for rank, one in enumerate(seen):
            assert one["RANK"] == one["LOCAL_RANK"] == str(rank)
            assert one["WORLD_SIZE"] == one["LOCAL_WORLD_SIZE"] == one["LOCAL_SIZE"] == "4"
            assert one["init_method"].startswith("file://")
        assert len({one["init_method"] for one in seen}) == 1
        folder = Path(seen[0]["init_method"].removeprefix("file://")).parent
        assert not folder.exists(), "temporary files are left"
        assert capfd.readouterr().out == "hello from rank 0\n"

    def test_preloads_once_before_the_forks(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MEGAMOE_TEST_IMPORTS", str(tmp_path / "imports"))
        preload = ("tests.unit.launch_imported",)
        result = launch("uses_imported", num_ranks=4, payload={"folder": str(tmp_path)}, preload=preload)
        assert result.exit_code == 0
        importers = (tmp_path / "imports").read_text().split()
        ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
        assert len(importers) == 1, "imported more than once"
        assert {one["parent"] for one in ranks} == {int(importers[0])}
        assert {one["set_by_import"] for one in ranks} == {"yes"}, "variables that an import sets reach the ranks"

    def test_failing_preload_is_told(self, capfd):
        result = launch("report", preload=("megamoe.no_such_module",))
        assert result.exit_code == 1 and result.failure.kind == "import"
        error = capfd.readouterr().err
        assert error.startswith("Importing megamoe.no_such_module failed:\nTraceback")
        assert "No module named 'megamoe.no_such_module'" in error

    def test_user_error_is_one_sentence(self, capfd):
        result = launch("user_error")
        assert (result.exit_code, result.failure.rank) == (ConfigError.exit_code, 1)
        assert capfd.readouterr().err == "megamoe: error: The value 7 is too odd: use 8.\n"

    def test_exception_shows_its_traceback_once(self, capfd):
        result = launch("exception")
        error = capfd.readouterr().err
        assert (result.exit_code, result.failure.rank) == (1, 2)
        assert error.startswith("Rank 2 failed:\nTraceback (most recent call last):\n")
        assert error.count("ValueError: broken") == 1 and error.count("Traceback") == 1
        assert error.endswith("Last output of rank 2:\nabout to break\n")
        assert "server.py" not in error

    def test_a_rank_that_lost_its_peer_is_not_taken_for_the_cause(self, capfd, tmp_path):
        result = launch("loses_peer", payload={"folder": str(tmp_path)})
        assert (result.exit_code, result.failure.rank, result.failure.kind) == (1, 1, "exception")
        assert "ValueError: the cause" in capfd.readouterr().err

    def test_exit_code_and_system_exit(self, capfd):
        assert launch("leaves", payload={"code": 7}).exit_code == 7
        assert "ended with exit code 7." in capfd.readouterr().err
        assert launch("leaves", payload={"code": 0}).exit_code == 1  # os._exit(0) in mid-work is no success
        assert "ended with exit code 0 before it was done." in capfd.readouterr().err
        assert launch("system_exit", payload={"code": 5}).exit_code == 5
        assert launch("system_exit", payload={"code": 0}).exit_code == 0

    def test_killed_rank_is_named(self, capfd):
        result = launch("killed", num_ranks=6)
        assert result.exit_code == 128 + 9
        assert capfd.readouterr().err == "Rank 5 was killed by signal 9, SIGKILL (out of memory?).\n"

    def test_ranks_that_ignore_sigterm_are_killed(self, tmp_path):
        started = time.monotonic()
        result = launch("one_fails_others_stay", payload={"folder": str(tmp_path)}, grace_seconds=0.5)
        assert time.monotonic() - started < 30
        assert (result.failure.rank, result.failure.kind) == (0, "user")
        assert not any(is_running(pid) for pid in process_ids(tmp_path, 3))

    def test_timeout_shows_stacks(self, tmp_path, capfd):
        result = launch("sleeps", payload={"folder": str(tmp_path)}, timeout_seconds=1.0)
        error = capfd.readouterr().err
        assert result.exit_code == 124
        assert error.startswith("The ranks did not end within 1 s.\nStacks of rank 0:\n")
        assert error.count("in sleeps") == 3
        assert not any(is_running(pid) for pid in process_ids(tmp_path, 3))

    def test_long_output_of_other_ranks_is_cut(self, capfd):
        result = launch("talks_then_fails", num_ranks=2)
        assert result.failure.rank == 1
        assert len(result.failure.output) <= 1 << 14
        assert "last words" in result.failure.output
        assert len(result.outputs[1]) < 3_000_000, "the file was never cut"
        capfd.readouterr()

    def test_what_a_rank_started_ends_with_it(self, tmp_path):
        assert launch("starts_a_child", num_ranks=1, payload={"folder": str(tmp_path)}).exit_code == 0
        child = int((tmp_path / "child").read_text())
        wait_for(lambda: not is_running(child))


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    def test_forwarded_and_handled_by_the_ranks(self, tmp_path, number):
        launcher = start_launcher("until_signal", tmp_path)
        ranks = process_ids(tmp_path)
        launcher.send_signal(number)
        assert launcher.wait(60) == 0
        assert {(tmp_path / f"{rank}.signal").read_text() for rank in range(2)} == {str(int(number))}
        assert not any(is_running(pid) for pid in ranks)

    @pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
    def test_forwarded_and_not_handled(self, tmp_path, number, name):
        launcher = start_launcher("sleeps", tmp_path)
        ranks = process_ids(tmp_path)
        launcher.send_signal(number)
        _, error = launcher.communicate(timeout=60)
        assert launcher.returncode == 128 + number
        assert error.endswith(f"Stopped by {name}.\n") and "Traceback" not in error
        assert not any(is_running(pid) for pid in ranks)

    def test_second_interrupt_kills(self, tmp_path):
        launcher = start_launcher("ignores_interrupt", tmp_path)
        ranks = process_ids(tmp_path)
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(60) == 128 + signal.SIGINT
        assert not any(is_running(pid) for pid in ranks)

    def test_killed_launcher_leaves_nothing(self, tmp_path):
        launcher = start_launcher("sleeps", tmp_path)
        ranks = process_ids(tmp_path)
        launcher.kill()
        launcher.wait(60)
        wait_for(lambda: not any(is_running(pid) for pid in ranks))
        wait_for(lambda: not list(tmp_path.glob("megamoe-ranks-*")))

    def test_killed_server_takes_the_ranks_along(self, tmp_path):
        launcher = start_launcher("sleeps", tmp_path)
        ranks = process_ids(tmp_path)
        server = int((tmp_path / "server").read_text())
        os.kill(server, signal.SIGKILL)
        _, error = launcher.communicate(timeout=60)
        assert launcher.returncode == 1
        assert error == "The process that holds the ranks died (signal 9, SIGKILL).\n"
        wait_for(lambda: not any(is_running(pid) for pid in ranks))
