"""Who is to blame for a run that stands still, from what ranks report: by hand, and over random programs of ranks."""

import random

import pytest

from megamoe.watchdog.clock import PatientClock
from megamoe.watchdog.judge import CONSEQUENCE_SECONDS, LOST_SECONDS, Judge, Limits, Report, blame


def judge_of(num_ranks: int, timeout_seconds: float = 10.0) -> Judge:
    judge = Judge(Limits(timeout_seconds))
    for rank in range(num_ranks):
        judge.joined(rank, f"node{rank}", 0.0)
    return judge


def report(step: int = 3, still: float = 0.0, limit: float = 10.0, **more) -> Report:
    return Report("train", step, "forward", still, limit, **more)


def test_ranks_that_get_on_are_left_alone():
    judge = judge_of(2)
    for now in range(1, 50):
        for rank in (0, 1):
            judge.heard(rank, report(still=0.5), float(now))
        assert not judge.stands_still(now + 0.4) and judge.ended(now + 0.4) is None


def test_a_rank_over_its_limit_is_noticed_and_each_has_its_own_limit():
    judge = judge_of(2)
    judge.heard(0, report(still=100.0, limit=1800.0), 1.0)
    judge.heard(1, report(still=9.9), 1.0)
    assert not judge.stands_still(1.0)
    judge.heard(1, report(still=10.1), 1.0)
    assert judge.stands_still(1.0)


def test_a_silent_rank_is_named_before_those_that_stand_still_because_of_it():
    judge = judge_of(3)
    judge.heard(1, Report("train", 7, "reduce"), 2.0)
    for rank in (0, 2):
        judge.heard(rank, report(still=30.0, waits=False), 12.5)
    assert not judge.silent(12.0) and judge.silent(12.5) == {1}
    verdict = judge.culprit(12.5, asked_at=12.2)
    assert verdict.message == "rank 1 on node1 hangs in step 7 (reduce): its heartbeat has stood still for 10 s"
    assert verdict.kind == "hang"


def test_a_lost_connection_is_a_death_unless_it_comes_back_or_was_announced():
    judge = judge_of(3)
    judge.left(2)
    judge.lost(2, 1.0)
    judge.lost(1, 1.0)
    assert judge.ended(1.0 + LOST_SECONDS) is None, "it may come back"
    judge.joined(1, "node1", 1.5)
    assert judge.ended(9.0) is None
    judge.lost(1, 9.0)
    verdict = judge.ended(9.1 + LOST_SECONDS)
    assert (verdict.kind, verdict.rank, verdict.host) == ("died", 1, "node1")
    assert not judge.stands_still(100.0), "a run with a dead rank does not hang, it is over"


def test_a_cause_is_named_however_many_consequences_came_before():
    judge = judge_of(4)
    judge.failed(3, "connection closed by peer", True, 1.0)
    judge.failed(2, "connection closed by peer", True, 1.1)
    assert judge.ended(1.2) is None
    judge.failed(1, "ValueError: the corpus is gone", False, 1.3)
    judge.failed(0, "ValueError: later", False, 1.4)
    verdict = judge.ended(1.4)
    assert (verdict.kind, verdict.rank) == ("failed", 1)
    assert verdict.message == "rank 1 on node1 failed in step 0 (setup): ValueError: the corpus is gone"


def test_a_death_is_named_before_its_consequences_and_the_first_of_these_where_there_is_nothing_else():
    judge = judge_of(3)
    judge.failed(2, "broken pipe", True, 1.0)
    judge.failed(1, "broken pipe", True, 1.1)
    assert judge.ended(1.0 + CONSEQUENCE_SECONDS) is None
    assert judge.ended(1.1 + CONSEQUENCE_SECONDS).rank == 2
    judge.lost(0, 1.2)
    assert judge.ended(1.3 + LOST_SECONDS).rank == 0


def test_a_heartbeat_after_the_answer_takes_nothing_of_it_back():
    judge = judge_of(2)
    for rank, calls in ((0, 4), (1, 3)):
        judge.heard(rank, report(still=11.0, waits=rank == 0, groups={"a": calls}), 20.0)
        judge.heard(rank, report(still=12.0), 21.0)
    verdict = judge.culprit(21.0, asked_at=19.0)
    assert verdict.rank == 1 and verdict.reason.startswith("no progress for 12 s; the others wait for it")


@pytest.mark.parametrize(("reports", "culprit", "why"), [
    ({0: report(4), 1: report(3), 2: report(4)}, 1, "a step behind"),
    ({0: report(waits=True), 1: report(waits=False), 2: report(waits=True)}, 1, "the others wait in a collective"),
    ({0: report(waits=True, groups={"a": 5}), 1: report(waits=True, groups={"a": 4})}, 1, "fewer collectives"),
    ({0: report(waits=False, groups={"a": 5}), 1: report(waits=False, groups={"a": 4})}, 1, "has not called"),
    ({0: report(still=4.0, waits=True), 1: report(still=9.0, waits=True)}, 1, "the network or a device"),
    ({0: report(still=4.0, waits=False), 1: report(still=9.0, waits=False)}, 1, "stopped before the others"),
    ({0: report(waits=False)}, 0, "stands still"),
])  # fmt: skip
def test_the_rank_furthest_behind_is_to_blame(reports, culprit, why):
    rank, reason = blame(reports)
    assert rank == culprit and why in reason


def test_waiting_is_followed_through_groups_to_the_rank_that_waits_for_nobody():
    """0 waits for 1 in one group, 1 for 2 in another; 3 is in no group with them and waits for 0 by a message."""
    reports = {
        0: report(waits=True, groups={"a": 9}),
        1: report(waits=True, groups={"a": 8, "b": 3}),
        2: report(waits=False, groups={"b": 2, "c": 1}),
        3: report(waits=True, groups={"c": 1}),
    }
    assert blame(reports)[0] == 2


def run_program(program: list[tuple[int, ...]], num_ranks: int, stopped: tuple[int, int]) -> dict[int, Report]:
    """Ranks that go through the same collectives in order, each among some of them; one stops before its n-th call.

    Returns where everybody stands once nobody can go on."""
    place = dict.fromkeys(range(num_ranks), 0)
    names = {str(sorted(members)): members for members in program}
    calls = {rank: {name: 0 for name, members in names.items() if rank in members} for rank in range(num_ranks)}
    mine = {rank: [n for n, members in enumerate(program) if rank in members] for rank in range(num_ranks)}
    entered: dict[int, set[int]] = {}
    waiting: dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        for rank in range(num_ranks):
            if rank in waiting:
                number = waiting[rank]
                if entered[number] == set(program[number]):
                    del waiting[rank]
                    place[rank] += 1
                    moved = True
            elif place[rank] < len(mine[rank]) and (rank, place[rank]) != stopped:
                number = mine[rank][place[rank]]
                entered.setdefault(number, set()).add(rank)
                name = str(sorted(program[number]))
                calls[rank][name] += 1
                waiting[rank] = number
                moved = True
    return {rank: report(still=5.0, waits=rank in waiting, groups=calls[rank]) for rank in range(num_ranks)
            if rank in waiting or rank == stopped[0]}  # fmt: skip


def test_whoever_stops_in_a_random_program_of_collectives_is_named():
    draw, num_checked = random.Random(20261128), 0
    for _ in range(400):
        num_ranks = draw.randint(2, 9)
        groups = [tuple(draw.sample(range(num_ranks), draw.randint(2, num_ranks))) for _ in range(4)]
        program = [draw.choice(groups) for _ in range(30)]
        rank = draw.randrange(num_ranks)
        num_calls = sum(rank in members for members in program)
        if num_calls < 2:
            continue
        reports = run_program(program, num_ranks, (rank, draw.randrange(1, num_calls)))
        if not any(each.waits for each in reports.values()):
            continue  # nobody needed it
        num_checked += 1
        assert blame(reports)[0] == rank, (program, rank, reports)
    assert num_checked > 200


def test_the_time_in_which_a_process_was_suspended_does_not_count():
    now = [100.0]
    clock = PatientClock(3.0, lambda: now[0])
    for seconds in (1.0, 2.0, 500.0, 1.0):
        now[0] += seconds
        clock.read()
    assert clock.read() == pytest.approx(1.0 + 2.0 + 3.0 + 1.0)
