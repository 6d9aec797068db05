"""Rank 0's part: it hears all ranks, and tells them the judge's verdict."""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from typing import Any

from megamoe.watchdog.channel import Address, Line, listen
from megamoe.watchdog.clock import PatientClock
from megamoe.watchdog.judge import Judge, Limits, Report, Verdict

ANSWER_SECONDS = 3.0  # what ranks have to write their stacks, before the verdict is given without them
GREETING_SECONDS = 10.0  # a connection that has not said by then who it is is closed
LEAVE_SECONDS = 1.5  # rank 0 hears the verdict this long after the others, at most


class _Peer:
    """One connection, and whose it is."""

    def __init__(self, line: Line, accepted: float) -> None:
        self.line, self.accepted = line, accepted
        self.rank: int | None = None


class Server:
    """A thread that hears, judges and tells. `address` is what the ranks connect to."""

    def __init__(self, num_ranks: int, limits: Limits, poll_seconds: float, *, host: str, everywhere: bool) -> None:
        self.num_ranks, self.poll_seconds = num_ranks, poll_seconds
        self.judge = Judge(limits)
        self.verdict: Verdict | None = None
        self._socket = listen(everywhere=everywhere)
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_hex(16))
        self._clock = PatientClock(2 * poll_seconds + 1)
        self._peers: dict[socket.socket, _Peer] = {}
        self._asked_at: float | None = None
        self._answered: set[int] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Tell the ranks that rank 0 leaves in good order, and end."""
        self._is_over.set()
        self._thread.join(self.poll_seconds + 2.0)

    def _run(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._socket.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ)
        try:
            while not self._is_over.is_set():
                self._listen(min(self.poll_seconds, 0.25))
                self._judge()
        finally:  # also after a defect of ours: the ranks must not take it for the death of rank 0
            self._tell_all({"do": "over"})
            for peer in list(self._peers.values()):
                self._drop(peer)
            self._selector.close()
            self._socket.close()

    def _listen(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._socket:
                self._accept()
                continue
            peer = self._peers.get(key.fileobj)
            if peer is not None:
                self._read(peer)
        late = time.monotonic() - GREETING_SECONDS
        for peer in [each for each in self._peers.values() if each.rank is None and each.accepted < late]:
            self._drop(peer)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            self._peers[connection] = _Peer(Line(connection), time.monotonic())
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, peer: _Peer) -> None:
        now = self._clock.read()
        try:
            for tree in peer.line.receive():
                self._take(peer, tree, now)
            peer.line.flush()
        except (OSError, KeyError, TypeError, ValueError):
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        connection = peer.line.socket
        if self._peers.pop(connection, None) is None:
            return
        self._selector.unregister(connection)
        peer.line.close()
        is_known = any(each.rank == peer.rank for each in self._peers.values())  # it has connected anew
        if peer.rank is not None and not is_known:
            self.judge.lost(peer.rank, self._clock.read())

    def _take(self, peer: _Peer, tree: dict[str, Any], now: float) -> None:
        """One message. What is malformed raises KeyError, TypeError or ValueError: the connection is closed then."""
        do = tree["do"]
        if peer.rank is None:
            if do != "hello" or not secrets.compare_digest(str(tree["token"]), self.address.token):
                raise ValueError("a stranger")
            rank = int(tree["rank"])
            if not 0 <= rank < self.num_ranks:
                raise ValueError("no rank of this run")
            peer.rank = rank
            self.judge.joined(rank, str(tree["host"]), now)
            peer.line.send(self._alive())
        elif do in ("beat", "report"):
            self.judge.heard(peer.rank, Report(**tree["report"]), now)
            if do == "report":
                self._answered.add(peer.rank)
            peer.line.send(self._alive())
        elif do == "leave":
            self.judge.left(peer.rank)
        elif do == "fail":
            self.judge.heard(peer.rank, Report(**tree["report"]), now)
            self.judge.failed(peer.rank, str(tree["message"]), bool(tree["is_consequence"]), now)

    def _alive(self) -> dict[str, Any]:
        """With where rank 0 is: should it fall silent, nobody else could say."""
        first = self.judge.ranks.get(0)
        if first is None:
            return {"do": "alive"}
        return {"do": "alive", "host": first.host, "step": first.report.step, "phase": first.report.phase}

    def _judge(self) -> None:
        now = self._clock.read()
        if self.verdict is not None:
            return
        verdict = self.judge.ended(now)
        if verdict is None and self._asked_at is None and self.judge.stands_still(now):
            self._asked_at, self._answered = now, set()
            self._tell_all({"do": "ask"})
        if verdict is None and self._asked_at is not None:
            present = {peer.rank for peer in self._peers.values() if peer.rank is not None}
            if present <= self._answered | self.judge.silent(now) or now - self._asked_at > ANSWER_SECONDS:
                verdict = self.judge.culprit(now, self._asked_at)
        if verdict is not None:
            self.verdict = verdict
            self._give(verdict)

    def _give(self, verdict: Verdict) -> None:
        """To all others before rank 0, whose process may end of it."""
        tree = {"do": "end", "verdict": verdict.as_tree()}
        self._tell_all(tree, but=0)
        deadline = time.monotonic() + LEAVE_SECONDS
        while verdict.kind == "hang" and time.monotonic() < deadline and self._num_others():
            self._listen(0.05)
        self._tell_all(tree, only=0)

    def _num_others(self) -> int:
        gone = {rank for rank, state in self.judge.ranks.items() if state.has_left}
        return sum(peer.rank not in (None, 0) and peer.rank not in gone for peer in self._peers.values())

    def _tell_all(self, tree: dict[str, Any], *, but: int | None = None, only: int | None = None) -> None:
        for peer in list(self._peers.values()):
            if peer.rank is None or peer.rank == but or (only is not None and peer.rank != only):
                continue
            try:
                peer.line.send(tree)
            except OSError:
                self._drop(peer)
