"""Saving where it goes wrong in the open: full, read-only and vanished disks, ranks that fail or never report."""

import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megamoe.checkpoint import faults
from megamoe.checkpoint.commit import begin, commit, report_failure
from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.folders import complete_checkpoints, recover
from megamoe.checkpoint.manifest import MANIFEST
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import Slice
from megamoe.checkpoint.writer import write_rank
from megamoe.config.loading import load_config
from megamoe.errors import CheckpointError, SaveError
from megamoe.topology.parameters import param_table
from tests.unit.checkpoint_cases import Tensors, load, print_table, random_tensors, same, save

SEED = 7
NUM_FULL_DISKS = 60
ROWS: list[tuple[str, int, int, int, int, int]] = []


@pytest.fixture(autouse=True)
def no_callback_stays(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    faults.set_callback(None)


def tensors_of(step: int) -> Tensors:
    return {key: tensor for key, tensor in random_tensors(random.Random(1), step).items() if key[0] == "weight"}


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in complete_checkpoints(root))


def one_slice(name: str = "w", size: int = 8) -> tuple[Slice, np.ndarray]:
    return Slice("weight", name, "F32", (size,), ((0, size),), 0, size), np.arange(size, dtype=np.float32)


def commit_defaults(num_ranks: int, step: int, save_id: str, **changes):
    arguments = {
        "num_ranks": num_ranks, "step": step, "save_id": save_id, "state": {}, "config": {}, "layout": {},
        "keep_last": 5, "keep_every_steps": None, "timeout_seconds": 5.0,
    }  # fmt: skip
    return arguments | changes


def check_older_are_whole(root: Path) -> None:
    assert steps_in(root) == [1, 2]
    for step in (1, 2):
        assert same(load(root / f"step_{step:08d}"), tensors_of(step))
    assert set(os.listdir(root)) == {"latest", "step_00000001", "step_00000002"}, "the partial folder is left"


def refused(action) -> str:
    """The message of the SaveError that `action` raises: one sentence, no traceback."""
    with pytest.raises(SaveError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def message_of_a_child(action) -> str:
    """Run `action` in a forked child; the message of the SaveError that it must end with, "" if it got through."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except SaveError as error:
            os.write(writer, str(error).encode()[:4000])
            os._exit(7)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as stream:
        text = stream.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (7 if text else 0), status
    return text


def test_a_disk_that_is_full_at_any_byte_costs_only_the_new_save(tmp_path):
    print(f"seed {SEED}")
    rng, root = random.Random(SEED), tmp_path / "root"
    for step in (1, 2):
        save(root, step, tensors_of(step))
    injected, largest = 0, (root / "step_00000002" / MANIFEST).stat().st_size - 50
    for _ in range(NUM_FULL_DISKS):
        num_bytes = rng.choice([rng.randrange(64), rng.randrange(largest)])

        def fill_and_save(num_bytes=num_bytes) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
            save(root, rng.choice([2, 3]), tensors_of(30))

        message = message_of_a_child(fill_and_save)
        assert message, num_bytes
        assert "File too large" in message or "cannot be written" in message or "rank" in message
        assert "\n" not in message
        check_older_are_whole(root)
        injected += 1
    ROWS.append(("disk full (EFBIG)", injected, injected, 0, 0, 0))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mountpoint)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield mountpoint
    subprocess.run(["umount", "-l", str(mountpoint)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    root = small_disk / "checkpoints"
    for step in (1, 2):
        save(root, step, tensors_of(step))
    big = {("weight", "w"): ("F32", np.zeros(100_000, np.float32))}
    message = refused(lambda: save(root, 3, big))
    assert "No space left on device" in message and "free space" in message and "weight_rank_0000" in message
    check_older_are_whole(root)
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        any(file.write(bytes(4096)) == 0 for _ in range(1000))
    message = refused(lambda: save(root, 3, tensors_of(3)))
    assert "No space left on device" in message or "could not write why, its disk may be full" in message
    check_older_are_whole(root)
    ballast.unlink()
    assert same(load(save(root, 3, tensors_of(3))), tensors_of(3))
    ROWS.append(("disk full (ENOSPC)", 2, 2, 0, 0, 0))


def test_a_read_only_disk_is_named(small_disk):
    root = small_disk / "checkpoints"
    for step in (1, 2):
        save(root, step, tensors_of(step))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = refused(lambda: save(root, 3, tensors_of(3)))
    assert "Read-only file system" in message and "mount it writable" in message and str(root) in message
    check_older_are_whole(root)
    assert recover(root) == []
    ROWS.append(("read-only disk", 1, 1, 0, 0, 0))


def test_a_folder_that_vanished_is_named(tmp_path):
    root = tmp_path / "checkpoints"
    injected = 0
    for point in ("begin-made", "file-written", "part-renamed", "commit-started", "commit-gathered", "manifest-synced"):
        shutil.rmtree(root, ignore_errors=True)
        for step in (1, 2):
            save(root, step, tensors_of(step))

        def lose_partial(reached, point=point) -> None:
            if reached == point:
                shutil.rmtree(next(root.glob(".*.partial")))

        faults.set_callback(lose_partial)
        message = refused(lambda: save(root, 3, tensors_of(3)))
        faults.set_callback(None)
        assert ".partial" in message and "vanished" in message, (point, message)
        check_older_are_whole(root)
        injected += 1
    faults.set_callback(lambda reached: shutil.rmtree(root) if reached == "commit-started" else None)
    assert "vanished" in refused(lambda: save(root, 3, tensors_of(3)))
    ROWS.append(("vanished folder", injected, injected, 0, 0, 0))


def test_the_folder_of_checkpoints_may_not_be_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    message = refused(lambda: begin(tmp_path / "checkpoints", 1, "a"))
    assert "a file stands where a folder must be" in message or "File exists" in message


def test_a_rank_that_fails_or_never_reports_is_named(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, tensors_of(step))
    partial = begin(tmp_path, 3, "a")
    write_rank(partial, rank=0, save_id="a", step=3, slices=[one_slice()])
    started = time.monotonic()
    message = refused(lambda: commit(tmp_path, partial, **commit_defaults(3, 3, "a", timeout_seconds=0.2)))
    assert "rank 1 did not finish writing within 0.2 s" in message and "2 of 3 ranks" in message
    assert 0.2 <= time.monotonic() - started < 3
    check_older_are_whole(tmp_path)

    partial = begin(tmp_path, 3, "b")
    write_rank(partial, rank=0, save_id="b", step=3, slices=[one_slice()])
    report_failure(partial, 1, "its disk is full")
    message = refused(lambda: commit(tmp_path, partial, **commit_defaults(2, 3, "b", timeout_seconds=60.0)))
    assert "rank 1 failed: its disk is full" in message
    check_older_are_whole(tmp_path)

    partial = begin(tmp_path, 3, "c")
    message = refused(lambda: commit(tmp_path, partial, **commit_defaults(2, 3, "c", is_cancelled=lambda: True)))
    assert "cancelled" in message
    check_older_are_whole(tmp_path)
    report_failure(tmp_path / "nowhere", 1, "never raises")
    ROWS.append(("rank fails, hangs, is cancelled", 3, 3, 0, 0, 0))


def test_commit_waits_for_ranks_that_are_slower(tmp_path):
    partial = begin(tmp_path, 5, "a")
    (mine, array), (other, other_array) = one_slice("w"), one_slice("v")
    write_rank(partial, rank=0, save_id="a", step=5, slices=[(mine, array)])

    def late() -> None:
        time.sleep(0.3)
        assert begin(tmp_path, 5, "a") == partial
        write_rank(partial, rank=1, save_id="a", step=5, slices=[(other, other_array)])

    thread = threading.Thread(target=late)
    thread.start()
    folder = commit(tmp_path, partial, **commit_defaults(2, 5, "a"))
    thread.join()
    assert set(load(folder)) == {("weight", "v"), ("weight", "w")}


def test_what_does_not_fit_together_is_not_saved(tmp_path):
    """A hole, an overlap, two shapes, a report of another save, values that JSON has no word for."""
    whole, array = one_slice()
    pieces = {
        "missing": [(whole.part(0, 4), array[:4])],
        "held 2 times": [(whole, array), (whole.part(2, 3), array[2:3])],
        "given twice": [(whole, array), (whole, array)],
    }
    for number, (message, slices) in enumerate(pieces.items()):
        partial = begin(tmp_path, 1, f"a{number}")

        def write_and_commit(partial=partial, slices=slices, number=number) -> None:
            write_rank(partial, rank=0, save_id=f"a{number}", step=1, slices=slices)
            commit(tmp_path, partial, **commit_defaults(1, 1, f"a{number}"))

        assert message in refused(write_and_commit)
        assert complete_checkpoints(tmp_path) == []
    partial = begin(tmp_path, 1, "b")
    write_rank(partial, rank=0, save_id="b", step=1, slices=[(whole.part(0, 4), array[:4])])
    write_rank(partial, rank=1, save_id="b", step=1, slices=[one_slice("w", 9)])
    assert "rank 1 has weight w as F32 [9]" in refused(lambda: commit(tmp_path, partial, **commit_defaults(2, 1, "b")))
    partial = begin(tmp_path, 1, "c")
    write_rank(partial, rank=0, save_id="other", step=1, slices=[(whole, array)])
    assert "save other" in refused(lambda: commit(tmp_path, partial, **commit_defaults(1, 1, "c")))
    for state in ({"loss": float("nan")}, {"set": {1}}, {"big": 10**5000}):
        partial = begin(tmp_path, 1, "d")
        write_rank(partial, rank=0, save_id="d", step=1, slices=[(whole, array)])
        arguments = commit_defaults(1, 1, "d", state=state)
        refused(lambda partial=partial, arguments=arguments: commit(tmp_path, partial, **arguments))
    with pytest.raises(CheckpointError, match="contiguous"):
        write_rank(partial, rank=0, save_id="d", step=1, slices=[(whole, np.zeros(16, np.float32)[::2])])
    assert [name for name in os.listdir(tmp_path) if name.startswith("step_")] == []


def test_a_parameter_of_the_model_that_nobody_wrote_is_missed(tmp_path):
    """The configuration's own table says what must be there, for every kind that is there at all."""
    config = load_config("laptop-moe", ["model.num_layers=2", "model.hidden_size=16", "model.vocab_size=64"])
    table = param_table(config.model, config.moe)
    tensors: Tensors = {("weight", p.name): ("F32", np.zeros(p.shape, np.float32)) for p in table}
    tree = config.model_dump(mode="json")
    folder = save(tmp_path, 1, tensors, config=tree)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.manifest.parameters == {p.name: p.shape for p in table}
        assert checkpoint.manifest.config == tree and checkpoint.manifest.versions["megamoe"]
    lost = table[-1].name
    assert f"weight {lost} is missing" in refused(
        lambda: save(tmp_path, 2, {key: t for key, t in tensors.items() if key[1] != lost}, config=tree)
    )
    only_one = tensors | {("exp_avg", lost): tensors["weight", lost]}
    assert "exp_avg" in refused(lambda: save(tmp_path, 2, only_one, config=tree))


@pytest.mark.parametrize(("keep_last", "every"), [(1, None), (2, None), (2, 4), (1, 3), (9, 2)])
def test_retention_keeps_the_last_and_every_mth(keep_last, every, tmp_path):
    tensors = {("weight", "w"): ("F32", np.zeros(3, np.float32))}
    for step in range(1, 10):
        save(tmp_path, step, tensors, keep_last=keep_last, keep_every_steps=every)
        done = range(1, step + 1)
        expected = {s for s in done if s > step - keep_last or (every is not None and s % every == 0)}
        assert set(steps_in(tmp_path)) == expected
        assert (tmp_path / "latest").read_text() == f"step_{step:08d}\n"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_run_taken_back_prefers_its_own_line(tmp_path):
    """Steps later than `latest` are of a run given up: they come last, and give way when saved again."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, tensors_of(step))
    (tmp_path / "latest").write_text("step_00000002\n")
    assert [path.name[-1] for path in complete_checkpoints(tmp_path)] == ["2", "1", "4", "3"]
    save(tmp_path, 3, tensors_of(30), keep_last=2)
    assert [path.name[-1] for path in complete_checkpoints(tmp_path)] == ["3", "2", "4"]
    assert same(load(tmp_path / "step_00000003"), tensors_of(30))
    (tmp_path / "latest").write_text("rubbish")
    assert [path.name[-1] for path in complete_checkpoints(tmp_path)] == ["4", "3", "2"]
    (tmp_path / "latest").unlink()
    assert complete_checkpoints(tmp_path)[0].name == "step_00000004"
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_the_table_of_refusals():
    """Last on purpose: what the tests above have injected."""
    if not ROWS:
        pytest.skip("the tests that fill the table were not selected")
    print_table(f"Saves that the disk or a rank refused; older checkpoints recovered exactly (seed {SEED})", ROWS)


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    replace_file(path, b"old")
    replace_file(path, "new é".encode())
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["latest"]

    def crash(source, target):
        assert path.read_text(encoding="utf-8") == "new é", "until the new content is complete"
        raise InterruptedError

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(InterruptedError):
        replace_file(path, b"newer")
    assert path.read_text(encoding="utf-8") == "new é"
