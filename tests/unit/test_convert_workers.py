"""Processes of a conversion end together, speak up when they cannot go on, and hold little memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.convert.workers import Task, ahead, batches, run_tasks
from megamoe.errors import ConversionError, DataError

ROOT = Path(__file__).parents[2]


def idle(say):
    time.sleep(60)


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(text) for text in file.read().split()]


def test_results_come_in_the_order_of_the_tasks_and_progress_adds_up():
    def task(number):
        def run(say):
            say(number)
            time.sleep(0.02 * (number % 3))
            return [number, os.getpid()]

        return Task(str(number), run)

    for num_workers in (0, 1, 3):
        seen = []
        results = run_tasks(
            [task(n) for n in range(9)], num_workers=num_workers, num_total_bytes=36, progress=seen.append
        )
        assert [number for number, _ in results] == list(range(9))
        pids = {pid for _, pid in results}
        assert (pids == {os.getpid()}) if num_workers == 0 else (os.getpid() not in pids and len(pids) <= num_workers)
        assert seen[-1].num_done_bytes == seen[-1].num_total_bytes == 36


def test_the_first_failure_ends_all_of_them():
    def refuse(say):
        raise DataError("this one is no good")

    def fail(say):
        raise KeyError("a defect")

    def die(say):
        os.kill(os.getpid(), signal.SIGKILL)

    for run, expected, message in (
        (refuse, DataError, "^this one is no good$"),
        (fail, RuntimeError, "(?s)the bad one failed.*KeyError: 'a defect'"),
        (die, ConversionError, "the bad one: its process was killed by signal 9"),
    ):
        before, started = children_of(os.getpid()), time.monotonic()
        with pytest.raises(expected, match=message):
            run_tasks([Task("slow", idle), Task("the bad one", run)], num_workers=2, num_total_bytes=1)
        assert time.monotonic() - started < 20 and children_of(os.getpid()) == before


def test_one_that_hangs_is_ended_and_named():
    with pytest.raises(ConversionError, match=r"stuck: nothing has moved for 0\.5 s"):
        run_tasks([Task("stuck", idle)], num_workers=1, num_total_bytes=1, stall_seconds=0.5)


def test_an_interrupt_and_a_death_of_the_parent_leave_no_process(tmp_path):
    program = (
        "import signal, time, sys\nfrom megamoe.convert.workers import Task, run_tasks\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background may ignore it
        "def run(say):\n    open(sys.argv[1] + str(time.monotonic_ns()), 'w').close()\n"
        "    while True:\n        say(1)\n        time.sleep(0.01)\n"
        "run_tasks([Task('a', run), Task('b', run)], num_workers=2, num_total_bytes=1)\n"
    )
    for number, which in enumerate((signal.SIGINT, signal.SIGKILL, signal.SIGTERM)):
        prefix = tmp_path / f"{number}-"
        process = subprocess.Popen([sys.executable, "-c", program, str(prefix)], cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_for(lambda prefix=prefix: len(list(tmp_path.glob(f"{prefix.name}*"))) == 2)
        workers = children_of(process.pid)
        assert len(workers) == 2
        process.send_signal(which)
        process.wait(20)
        wait_for(lambda workers=workers: not any(is_alive(pid) for pid in workers))


def wait_for(is_so, seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_thread_ahead_gives_the_same_and_hands_over_what_it_raises():
    def items(last):
        yield from range(5)
        if last is not None:
            raise last

    assert list(ahead(items(None), 2)) == list(range(5))
    with pytest.raises(DataError, match="at the end"):
        list(ahead(items(DataError("at the end")), 3))
    half = ahead(iter(range(10**9)), 2)
    assert next(half) == 0
    half.close()  # ends the thread, does not wait for the rest
    alive = []
    for number in ahead((alive.append(n) or n for n in range(9)), 3):
        time.sleep(0.02)
        assert len(alive) - number <= 3
    assert list(batches(range(7), lambda n: n, 5)) == [[0, 1, 2, 3], [4, 5], [6]]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A sparse checkpoint of 400 MB, and its export: each far above what a conversion may hold."""
    program = (
        "import sys, json\nsys.path.insert(0, 'tools/benchmarks')\nimport convert as bench\nfrom pathlib import Path\n"
        "from megamoe.convert.from_hf import import_\nfrom megamoe.convert.to_hf import export\n"
        "root = Path(sys.argv[1])\nconfig = bench.model_of(400)\nsource = bench.write_sparse_source(root, config, 3)\n"
        "table = bench.table_of(config)\nbase = bench.tree_bytes()\n"
        "with bench.PeakOfTree() as memory:\n"
        "    export(source, root / 'out', table, dtype='bf16', workers=2, shard_bytes=150_000_000)\n"
        "exported = memory.peak - base\n"
        "with bench.PeakOfTree() as memory:\n    import_(root / 'out', root / 'back', table, workers=2)\n"
        "print(json.dumps([bench.tensor_bytes(config), exported, memory.peak - base]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=False, capture_output=True, text=True, timeout=300,
        cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_bytes, exported, imported = json.loads(done.stdout)
    print(f"{num_bytes / 1e6:.0f} MB: export {exported / 1e6:.0f} MB, import {imported / 1e6:.0f} MB")
    assert num_bytes > 300e6
    assert 10e6 < exported < 200e6 and 10e6 < imported < 200e6
