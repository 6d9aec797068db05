"""Watchdogs of several ranks as threads of this process, over real sockets: who is named, and what disturbs nobody."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamoe.phases import PhaseClock
from megamoe.watchdog.channel import Address, Line, connect
from megamoe.watchdog.judge import Limits, Verdict
from megamoe.watchdog.progress import Progress
from megamoe.watchdog.server import Server
from megamoe.watchdog.stacks import StackFile
from megamoe.watchdog.watch import Settings, Watch

SETTINGS = Settings(timeout_seconds=1.5, slow_timeout_seconds=5.0, poll_seconds=0.05)


class Rank:
    """A rank's watchdog, and a thread that works: its clock changes while `works` is set."""

    def __init__(self, rank: int, address: Address, folder: Path, server: Server | None, settings: Settings) -> None:
        self.clock, self.ends, self.works = PhaseClock(), [], threading.Event()
        self.progress, self.counts = Progress(self.clock), {"world": 3}
        self.progress.stage, self.progress.step, self.phase = "train", 4, "forward"
        self.stacks = StackFile(folder / "stacks" / "attempt_0001" / f"rank_{rank}.txt")
        self.watch = Watch(
            rank, f"node{rank}", address, settings, self.progress, self.stacks,
            count_collectives=lambda: self.counts, end=self.ends.append, server=server,
        )  # fmt: skip
        self.is_over = threading.Event()
        self.works.set()
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while not self.is_over.is_set():
            with self.clock.phase(self.phase):
                self.works.wait()
                time.sleep(0.01)

    def start(self) -> None:
        self.watch.start()


@contextlib.contextmanager
def run_of(num_ranks: int, folder: Path, settings: Settings = SETTINGS) -> Iterator[tuple[Server, list[Rank]]]:
    server = Server(num_ranks, Limits(settings.timeout_seconds), settings.poll_seconds, host="127.0.0.1",
                    everywhere=False)  # fmt: skip
    server.start()
    ranks = [Rank(rank, server.address, folder, server if rank == 0 else None, settings) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    try:
        yield server, ranks
    finally:
        for rank in reversed(ranks):
            rank.works.set()
            rank.is_over.set()
            rank.watch.leave()


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def test_who_works_is_left_alone_and_leaves_no_file(tmp_path):
    with run_of(3, tmp_path) as (server, ranks):
        time.sleep(2 * SETTINGS.timeout_seconds)
        assert server.verdict is None and not any(rank.ends for rank in ranks)
        assert sorted(server.judge.ranks) == [0, 1, 2] and server.judge.ranks[2].report.step == 4
    assert list(tmp_path.iterdir()) == [], "no stacks were needed"


def test_the_rank_that_stands_still_is_named_to_all_with_the_stacks_of_all(tmp_path):
    with run_of(3, tmp_path) as (_, ranks):
        began = time.monotonic()
        ranks[1].counts = {"world": 2}  # the others have called one collective more
        for rank in ranks:
            rank.works.clear()
        wait_for(lambda: all(rank.ends for rank in ranks))
        assert time.monotonic() - began < SETTINGS.timeout_seconds + 5.0
        (verdict,) = {rank.ends[0] for rank in ranks}
        assert (verdict.kind, verdict.rank, verdict.host, verdict.step) == ("hang", 1, "node1", 4)
        assert verdict.phase == "forward" and "it has not called" in verdict.reason
        for rank in range(3):
            text = (tmp_path / "stacks/attempt_0001" / f"rank_{rank}.txt").read_text()
            assert text.startswith(f"rank {rank} on node{rank}, step 4, forward, no progress for ")
            assert "test_watchdog.py" in text and " in work" in text, "the thread that works is there"


def test_a_slow_phase_has_more_time(tmp_path):
    with run_of(2, tmp_path) as (server, ranks):
        ranks[1].phase = "save"
        wait_for(lambda: ranks[1].progress.phase == "save")
        ranks[1].works.clear()
        time.sleep(2 * SETTINGS.timeout_seconds)
        assert server.verdict is None
        report = ranks[1].watch.report()
        assert (report.phase, report.limit_seconds) == ("save", SETTINGS.slow_timeout_seconds)


def test_a_rank_whose_heartbeat_stops_is_named(tmp_path):
    with run_of(2, tmp_path) as (server, ranks):
        server.num_ranks = 3
        silent = connect(server.address, 2, "node2")
        wait_for(lambda: ranks[0].ends)
        assert (ranks[0].ends[0].kind, ranks[0].ends[0].rank) == ("hang", 2)
        assert "heartbeat has stood still" in ranks[0].ends[0].message
        silent.close()


def test_a_rank_whose_connection_breaks_is_dead_and_who_loses_it_hears_so(tmp_path):
    with run_of(2, tmp_path) as (server, ranks):
        server.num_ranks = 3
        connect(server.address, 2, "node2").close()
        verdict = ranks[1].watch.fail("broken pipe", is_consequence=True, wait_seconds=10.0)
        assert (verdict.kind, verdict.rank, verdict.host) == ("died", 2, "node2")
        wait_for(lambda: ranks[0].watch.verdict is not None)
        assert not ranks[0].ends, "its training thread finds out by itself"


def test_a_training_thread_that_waits_for_a_dead_peer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("megamoe.watchdog.watch.END_SECONDS", 0.5)
    with run_of(2, tmp_path) as (_, ranks):
        ranks[1].watch.fail("ValueError: injected", is_consequence=False, wait_seconds=0.0)
        wait_for(lambda: ranks[0].ends)
        assert ranks[0].ends[0].message == "rank 1 on node1 failed in step 4 (forward): ValueError: injected"


def test_a_connection_that_was_cut_is_made_anew(tmp_path):
    with run_of(2, tmp_path) as (server, ranks):
        for peer in list(server._peers.values()):
            peer.line.socket.shutdown(socket.SHUT_RDWR)
        time.sleep(2.0)
        assert server.verdict is None and not ranks[1].ends
        assert server.judge.ranks[1].lost_at is None and server.judge.ranks[1].report.step == 4


def test_strangers_and_nonsense_are_turned_away(tmp_path):
    with run_of(2, tmp_path) as (server, ranks):
        address = server.address
        lines = [b'{"do":"hello","token":"wrong","rank":1,"host":"x"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[1]\n",
                 b"\xff\n", b"x" * (1 << 20),
                 b'{"do":"hello","token":"%s","rank":7,"host":"x"}\n' % address.token.encode(),
                 b'{"do":"hello","token":"%s","rank":"1"}\n' % address.token.encode()]  # fmt: skip
        for line in lines:
            with socket.create_connection((address.host, address.port), timeout=5) as stranger:
                stranger.settimeout(5)
                with contextlib.suppress(OSError):
                    stranger.sendall(line)
                    assert stranger.recv(100) == b"", line[:50]
        time.sleep(0.3)
        assert server.verdict is None and sorted(server.judge.ranks) == [0, 1] and not ranks[1].ends


def listener() -> tuple[socket.socket, Address]:
    server = socket.create_server(("127.0.0.1", 0))
    return server, Address("127.0.0.1", server.getsockname()[1], "token")


@pytest.mark.parametrize("answers", [True, False])
def test_a_first_rank_that_answers_no_more_is_named_by_the_others(tmp_path, answers):
    server, address = listener()
    rank = Rank(1, address, tmp_path, None, SETTINGS)
    rank.start()
    connection, _ = server.accept()
    if answers:
        Line(connection).send({"do": "alive", "host": "node0", "step": 9, "phase": "reduce"})
    wait_for(lambda: rank.ends)
    expected = ("node0", 9, "reduce") if answers else ("127.0.0.1", 0, "train")
    verdict: Verdict = rank.ends[0]
    assert (verdict.kind, verdict.rank, verdict.host, verdict.step, verdict.phase) == ("hang", 0, *expected)
    assert "test_watchdog.py" in (tmp_path / "stacks/attempt_0001/rank_1.txt").read_text()
    rank.watch.leave()
    server.close()


def test_a_first_rank_whose_process_is_gone_is_dead_unless_it_left_in_good_order(tmp_path):
    for leaves in (False, True):
        server, address = listener()
        rank = Rank(1, address, tmp_path, None, SETTINGS)
        rank.start()
        connection, _ = server.accept()
        if leaves:
            Line(connection).send({"do": "over"})
            time.sleep(0.2)
        connection.close()
        server.close()
        if leaves:
            time.sleep(2.0)
            assert rank.watch.verdict is None
        else:
            wait_for(rank.watch._has_verdict.is_set)
            assert (rank.watch.verdict.kind, rank.watch.verdict.rank) == ("died", 0)
        rank.watch.leave()


def test_a_defect_of_the_watchdog_ends_no_run(tmp_path, monkeypatch, capfd):
    with run_of(2, tmp_path) as (server, ranks):
        wait_for(lambda: 1 in server.judge.ranks)
        monkeypatch.setattr(ranks[1].watch, "report", lambda: 1 / 0)
        wait_for(lambda: server.judge.ranks[1].has_left)
        time.sleep(2 * SETTINGS.timeout_seconds)
        assert server.verdict is None and not ranks[0].ends
    assert "the watchdog of rank 1 is off: ZeroDivisionError" in capfd.readouterr().out


def test_the_last_words_of_a_rank_that_breaks_its_connection_are_heard():
    """Closed with an answer unread, as by a process that ends or is killed, a connection is reset."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = Line(socket.create_connection(server.getsockname()))
        ours = Line(server.accept()[0])
        ours.send({"do": "alive"})
        assert theirs.wait(10.0)
        theirs.send({"do": "leave"})
        theirs.close()
        assert ours.wait(10.0)
        time.sleep(0.2)
        heard = ours.receive()
        assert next(heard) == {"do": "leave"}
        with pytest.raises(ConnectionResetError):
            next(heard)


def test_nobody_who_answers_is_an_error_at_once():
    server, address = listener()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        connect(address, 1, "node1")
