"""Which rank failed first, read from what all ranks left: causes before consequences, across clocks and nodes."""

import json
import multiprocessing
import os

import pytest

from megamoe.errors import DataError, PeerLost, TrainingHung
from megamoe.launch.environment import node_name
from megamoe.runs.events import read_events
from megamoe.runs.failures import (
    RankFailure,
    claim_first,
    clear,
    conclude,
    describe,
    first_failure,
    is_consequence,
    read_failures,
    tell_first,
    write_failure,
)

CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:3980."
GLOO = (CLOSED, "Connection reset by peer", "Timed out waiting 300000ms for recv operation to complete",
        "Application timeout caused pair closure", "Broken pipe", "Read timeout [127.0.0.1]:9")  # fmt: skip
NCCL = ("NCCL error: remote process exited or there was a network error",
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)",
        "Socket Timeout", "wait timeout after 300000ms, keys: /default_pg/0//cpu//0")  # fmt: skip


def failure(rank: int, time: float, *, consequence: bool = False, kind: str = "exception", **more) -> RankFailure:
    return RankFailure(rank, kind, f"of rank {rank}", time, is_consequence=consequence, num_ranks=4, **more)


def write(run_dir, *found: RankFailure, attempt: int = 1) -> None:
    for each in found:
        assert write_failure(run_dir, attempt, each)


@pytest.mark.parametrize("text", [*GLOO, *NCCL])
def test_what_torch_says_of_a_lost_peer_is_a_consequence(text):
    assert is_consequence(RuntimeError(text))


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ValueError("connection closed by peer"),
    RuntimeError("shape '[2, 3]' is invalid for input of size 5"), DataError("the corpus is gone"),
    ConnectionResetError("a file server"),
])  # fmt: skip
def test_other_errors_are_causes(error):
    assert not is_consequence(error)


def test_a_cause_wins_over_consequences_that_were_seen_before_it(tmp_path):
    write(tmp_path, failure(0, 10.0, consequence=True), failure(3, 12.0), failure(1, 13.0))
    assert first_failure(tmp_path, 1).rank == 3


def test_a_death_and_a_users_error_lead_the_errors_around_them(tmp_path):
    write(tmp_path, failure(0, 10.0), failure(2, 10.9, kind="killed"))
    assert first_failure(tmp_path, 1).rank == 2
    write(tmp_path, failure(3, 10.8, kind="user"))
    assert first_failure(tmp_path, 1).rank == 3


def test_a_rank_that_left_no_word_is_named_where_all_others_are_consequences(tmp_path):
    write(tmp_path, *(failure(rank, 10.0 + rank, consequence=True) for rank in (0, 1, 3)))
    found = first_failure(tmp_path, 1)
    assert (found.rank, found.kind) == (2, "died") and "without a word" in found.message
    write(tmp_path, failure(2, 30.0, consequence=True))
    assert first_failure(tmp_path, 1).rank == 0, "nothing but consequences: the first of them"


def test_attempts_are_told_apart_and_an_empty_one_has_no_failure(tmp_path):
    write(tmp_path, failure(1, 5.0), attempt=2)
    assert first_failure(tmp_path, 1) is None and first_failure(tmp_path, 2).rank == 1
    clear(tmp_path, 2)
    assert first_failure(tmp_path, 2) is None


def test_what_is_written_is_read_and_damage_is_passed_over(tmp_path):
    error = DataError("data/text.bin is missing")
    whole = describe(error, "x" * 20_000 + "the end", rank=2, step=7, phase="data", num_ranks=4)
    assert (whole.kind, whole.exit_code, whole.host) == ("user", 2, node_name())
    write(tmp_path, whole)
    (tmp_path / "failures/attempt_0001/rank_00003.json").write_text('{"rank": 3')
    (read,) = read_failures(tmp_path, 1)
    assert read.traceback.endswith("the end") and len(read.traceback) == 8_000
    assert (read.message, read.step, read.phase) == (whole.message, 7, "data")
    assert read.sentence == f"rank 2 on {node_name()} failed first in step 7 (data): data/text.bin is missing"


def test_peers_of_a_dead_rank_may_all_write_of_it_in_the_same_moment(tmp_path, monkeypatch):
    sync, others = os.fsync, [failure(1, 1.0, kind="died", step=5), failure(1, 1.5, kind="died", step=5)]

    def sync_late(descriptor: int) -> None:  # one peer is in the middle of its file, another begins and ends
        if others:
            write(tmp_path, others.pop())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_late)
    write(tmp_path, failure(1, 1.123456789, kind="died", step=5, host="a name that is longer"))
    assert not others and [(each.rank, each.step) for each in read_failures(tmp_path, 1)] == [(1, 5)]
    assert [path.name for path in (tmp_path / "failures/attempt_0001").iterdir()] == ["rank_00001.json"]


def test_kinds_of_errors(tmp_path):
    hang = describe(TrainingHung("rank 1 hangs"), "", rank=0)
    assert (hang.kind, hang.exit_code) == ("hang", 4)
    lost = describe(PeerLost("rank 1 is gone"), "", rank=0)
    assert lost.is_consequence and lost.exit_code == 1
    assert describe(RuntimeError(CLOSED), "", rank=0).is_consequence
    assert describe(KeyError("a"), "", rank=0).kind == "exception"


def test_no_folder_is_made_for_a_failure_and_none_is_needed(tmp_path):
    missing = tmp_path / "missing"
    assert not write_failure(missing, 1, failure(0, 1.0)) and not claim_first(missing, 1)
    tell_first(missing, 1, failure(0, 1.0))
    assert not missing.exists()


def _claim(run_dir: str, claimed) -> None:
    claimed.put(claim_first(run_dir, 1))


def test_one_process_tells_of_the_end(tmp_path):
    context = multiprocessing.get_context("fork")
    claimed = context.Queue()
    processes = [context.Process(target=_claim, args=(str(tmp_path), claimed)) for _ in range(8)]
    for process in processes:
        process.start()
    assert sorted(claimed.get(timeout=30) for _ in processes) == [False] * 7 + [True]
    for process in processes:
        process.join()


def test_the_launcher_knows_of_a_killed_rank_what_the_others_know_of_its_place(tmp_path):
    write(tmp_path, failure(1, 10.0, kind="died", step=5, phase="reduce", host="node3"))
    conclude(tmp_path, 1, kind="killed", rank=1, message="Rank 1 was killed by signal 9, SIGKILL.", exit_code=137,
             num_ranks=4)  # fmt: skip
    (event,) = read_events(tmp_path)
    told = {key: event[key] for key in ("kind", "rank", "host", "phase", "step", "attempt", "cause", "message")}
    assert told == {"kind": "failed", "rank": 1, "host": "node3", "phase": "reduce", "step": 5, "attempt": 1,
                    "cause": "killed", "message": "Rank 1 was killed by signal 9, SIGKILL."}  # fmt: skip
    assert json.loads((tmp_path / "failures/attempt_0001/first.json").read_text())["kind"] == "killed"
    conclude(tmp_path, 1, kind="exit", rank=2, message="later", exit_code=1, num_ranks=4)
    assert len(read_events(tmp_path)) == 1, "told once"


def test_what_the_user_ended_is_no_failure(tmp_path):
    for kind in ("stopped", "interrupted"):
        conclude(tmp_path, 1, kind=kind, rank=None, message="", exit_code=143, num_ranks=4)
    assert read_events(tmp_path) == []
