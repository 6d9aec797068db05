"""The harness for many ranks must itself be able to fail, in time, and blame the right rank."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests import harness
from tests.harness import RanksFailed, run_ranks


def sum_over_ranks(value: float, *, scale: float = 1.0) -> tuple[int, float, int]:
    total = torch.full((3,), value * scale)
    dist.all_reduce(total)
    return dist.get_rank(), total[0].item(), torch.get_num_threads()


def first_fails_others_break() -> None:
    if dist.get_rank() == 3:
        print("words of rank 3")
        raise ValueError("the cause")
    dist.all_reduce(torch.ones(1))  # the others: "connection closed by peer"


def hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(100)
    dist.all_reduce(torch.ones(1))


def leaves_silently() -> None:
    if dist.get_rank() == 2:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def is_killed() -> None:
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def variable(name: str) -> tuple[str | None, bool]:
    return os.environ.get(name), dist.is_initialized()


def test_results_come_in_rank_order():
    assert run_ranks(sum_over_ranks, 4, 2.0, scale=3.0) == [(rank, 24.0, 1) for rank in range(4)]


def test_first_failing_rank_is_reported():
    with pytest.raises(RanksFailed) as error:
        run_ranks(first_fails_others_break, 6)
    assert error.value.failure.rank == 3
    assert "ValueError: the cause" in str(error.value) and "words of rank 3" in str(error.value)


def test_hang_is_ended_in_time_with_the_stacks_of_all_ranks():
    started = time.monotonic()
    with pytest.raises(RanksFailed, match=r"did not end within 2 s") as error:
        run_ranks(hangs, 3, timeout_seconds=2)
    assert time.monotonic() - started < 60
    text = str(error.value)
    assert [f"Stacks of rank {rank}:" in text for rank in range(3)] == [True] * 3
    assert text.count("in hangs") == 3 and text.count("in all_reduce") == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [(leaves_silently, "Rank 2 ended with exit code 7."), (is_killed, "Rank 2 was killed by signal 9, SIGKILL")],
)
def test_silent_deaths_are_named(function, message):
    with pytest.raises(RanksFailed, match=message):
        run_ranks(function, 4)


def test_environment_of_the_moment_reaches_the_ranks(monkeypatch):
    monkeypatch.setenv("MEGAMOE_TEST_VARIABLE", "now")
    assert run_ranks(variable, 2, "MEGAMOE_TEST_VARIABLE") == [("now", True)] * 2
    monkeypatch.delenv("MEGAMOE_TEST_VARIABLE")
    assert run_ranks(variable, 1, "MEGAMOE_TEST_VARIABLE", init=False) == [(None, False)]


def test_server_has_no_threads_that_a_fork_would_lose():
    assert run_ranks(variable, 1, "HOME", init=False)
    assert len(os.listdir(f"/proc/{harness._server.process.pid}/task")) == 1
