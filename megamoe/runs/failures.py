"""How the ranks of an attempt ended in an error, one JSON file a rank, and which of them was the first.

    failures/attempt_0003/rank_00012.json    what the rank itself, or who saw it die, wrote of its end
    failures/attempt_0003/first.json         the first failure, once it has been told to the run's events

A rank whose peer dies finds a broken connection or a timeout: a consequence, which is never named where there is a
cause. A rank that dies without a word leaves no file: it is the one that is missing where all others are consequences.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.errors import MegamoeError, PeerLost, TrainingHung
from megamoe.launch.environment import node_name
from megamoe.runs.events import append_event

MAX_TRACEBACK_CHARACTERS = 8_000  # the end, which is nearest to the error
# What the user is to mend may come up after the rank has closed its connections, a death is seen after the broken
# connections it caused: both began before what they brought about.
CAUSE_LEAD_SECONDS = 1.0
_FIRST = "first.json"
_LEADING_KINDS = ("user", "died", "killed", "exit")
# What gloo, NCCL and the store of torch.distributed say when another rank is gone or does not come.
_PEER_WORDS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted|timed out)|broken pipe|timed out waiting|read timeout|"
    r"socket timeout|wait timeout|caused pair closure|closed by (remote )?peer|reset by (remote )?peer|"
    r"remote process exited|ncclremoteerror|watchdog caught collective operation timeout|"
    r"timed out after \d+ seconds|timed out in .*(send|recv)|failed to recv|connect(ion)? to .* timed out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RankFailure:
    """The end of one rank. `kind`: user (an error that the user is to mend), exception, hang, killed (by a signal),
    exit, or died (nobody knows how). `phase` and `step` are where it was; `time` is in seconds since 1970, UTC."""

    rank: int
    kind: str
    message: str
    time: float
    host: str | None = None
    step: int | None = None
    phase: str | None = None
    traceback: str = ""
    is_consequence: bool = False
    exit_code: int | None = None
    num_ranks: int | None = None

    @property
    def sentence(self) -> str:
        """Who, where, what: one line."""
        host = f" on {self.host}" if self.host else ""
        where = f" in step {self.step}" if self.step is not None else ""
        where += f" ({self.phase})" if self.phase else ""
        return f"rank {self.rank}{host} failed first{where}: {_first_line(self.message)}"


def attempt_folder(run_dir: str | os.PathLike[str], what: str, attempt: int) -> Path:
    """`what` is "failures" or "stacks"."""
    return Path(run_dir) / what / f"attempt_{attempt:04d}"


def rank_file(folder: Path, rank: int, ending: str) -> Path:
    return folder / f"rank_{rank:05d}{ending}"


def is_consequence(error: BaseException) -> bool:
    """Whether this is how torch.distributed tells that another rank is gone, or does not come."""
    return isinstance(error, PeerLost) or (
        isinstance(error, RuntimeError) and _PEER_WORDS.search(str(error)) is not None
    )


def clear(run_dir: str | os.PathLike[str], attempt: int) -> None:
    """Take away what an earlier start under this number left, which never got as far as its "start" event."""
    shutil.rmtree(attempt_folder(run_dir, "failures", attempt), ignore_errors=True)


def write_failure(run_dir: str | os.PathLike[str], attempt: int, failure: RankFailure) -> bool:
    """Keep how a rank ended; whether that worked. A run's folder that does not exist is not made for this."""
    tree = asdict(failure)
    tree["traceback"] = failure.traceback[-MAX_TRACEBACK_CHARACTERS:]
    folder = attempt_folder(run_dir, "failures", attempt)
    try:
        if not Path(run_dir).is_dir():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        # All peers of a dead rank write what they know of it, in the same moment.
        writer = f".{secrets.token_hex(8)}"
        replace_file(rank_file(folder, failure.rank, ".json"), json.dumps(tree, indent=1).encode(), writer=writer)
    except OSError:  # the disk may be what failed
        return False
    return True


def has_failure(run_dir: str | os.PathLike[str], attempt: int, rank: int) -> bool:
    return rank_file(attempt_folder(run_dir, "failures", attempt), rank, ".json").exists()


def read_failures(run_dir: str | os.PathLike[str], attempt: int) -> list[RankFailure]:
    """By rank. Files that are damaged are left out."""
    found = []
    for path in sorted(attempt_folder(run_dir, "failures", attempt).glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            tree = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            known = {field.name for field in fields(RankFailure)}
            found.append(RankFailure(**{key: value for key, value in tree.items() if key in known}))
    return found


def first_failure(run_dir: str | os.PathLike[str], attempt: int) -> RankFailure | None:
    """What brought an attempt down, over all ranks and nodes; None where no rank has left a word."""
    return first_of(read_failures(run_dir, attempt))


def first_of(failures: list[RankFailure]) -> RankFailure | None:
    """The earliest cause. Where all are consequences, a rank that left no file died without a word."""
    causes = [each for each in failures if not each.is_consequence]
    if causes:
        return min(causes, key=_began)
    if not failures:
        return None
    num_ranks = max((each.num_ranks or 0 for each in failures), default=0)
    silent = sorted(set(range(num_ranks)) - {each.rank for each in failures})
    if not silent:
        return min(failures, key=_began)
    others = f"; nor did ranks {', '.join(map(str, silent[1:]))}" if len(silent) > 1 else ""
    message = f"rank {silent[0]} ended without a word, its peers lost their connections{others}"
    began = min(each.time for each in failures)
    return RankFailure(silent[0], "died", message, began, num_ranks=num_ranks)


def claim_first(run_dir: str | os.PathLike[str], attempt: int) -> bool:
    """True for one process of all that ask, which is to tell of the attempt's end."""
    folder = attempt_folder(run_dir, "failures", attempt)
    try:
        if not Path(run_dir).is_dir():
            return False
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / _FIRST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except OSError:
        return False
    return True


def tell_first(run_dir: str | os.PathLike[str], attempt: int, failure: RankFailure, kind: str = "failed") -> None:
    """Append the event; to be called by who has claimed it. Never raises: the run has failed already."""
    where = {"rank": failure.rank, "host": failure.host, "phase": failure.phase, "step": failure.step}
    with contextlib.suppress(OSError):
        replace_file(
            attempt_folder(run_dir, "failures", attempt) / _FIRST, json.dumps(asdict(failure), indent=1).encode()
        )
        append_event(run_dir, kind, _first_line(failure.message), attempt=attempt, cause=failure.kind, **where)


def conclude(
    run_dir: str | os.PathLike[str], attempt: int, *, kind: str, rank: int | None, message: str, exit_code: int,
    num_ranks: int,
) -> None:  # fmt: skip
    """What the launcher of this machine saw: it knows of ranks that could not say anything, and tells the event."""
    if kind in ("stopped", "interrupted", "import"):  # by the user, or before there was a rank
        return
    if rank is None:
        failure = RankFailure(-1, kind, message, time.time(), node_name(), num_ranks=num_ranks, exit_code=exit_code)
    else:
        known = {each.rank: each for each in read_failures(run_dir, attempt)}.get(rank)
        failure = known or RankFailure(rank, kind, message, time.time(), node_name(), num_ranks=num_ranks)
        if known is None or kind in ("killed", "exit"):
            failure = replace(failure, kind=kind, message=message, exit_code=exit_code, is_consequence=False)
            write_failure(run_dir, attempt, failure)
    if claim_first(run_dir, attempt):
        tell_first(run_dir, attempt, failure)


def describe(error: BaseException, trace: str, **details: Any) -> RankFailure:
    """The end of a rank by this exception, from what it says and its traceback; `details` are further fields."""
    kind = "exception"
    if isinstance(error, TrainingHung):
        kind = "hang"
    elif isinstance(error, MegamoeError):
        kind = "user"
    message = str(error) if isinstance(error, MegamoeError) else f"{type(error).__name__}: {error}"
    exit_code = error.exit_code if isinstance(error, MegamoeError) else 1
    return RankFailure(
        kind=kind, message=message, time=time.time(), traceback=trace, is_consequence=is_consequence(error),
        exit_code=exit_code, **{"host": node_name()} | details,
    )  # fmt: skip


def as_consequence(failure: RankFailure) -> RankFailure:
    return replace(failure, is_consequence=True)


def as_death(failure: RankFailure, reason: str) -> RankFailure:
    """Of a rank that others saw vanish."""
    return replace(failure, kind="died", message=reason, exit_code=None)


def _began(failure: RankFailure) -> float:
    return failure.time - CAUSE_LEAD_SECONDS * (failure.kind in _LEADING_KINDS)


def _first_line(message: str) -> str:
    lines = message.strip().splitlines()
    return lines[0] if lines else ""
