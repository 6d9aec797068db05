"""How a rank tells others of its end: failures on record, a watchdog around the run, events of its start and end."""

import contextlib
import json
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megamoe.config.schema import Config
from megamoe.config.validation import hang_timeout_seconds
from megamoe.errors import PeerLost, TopologyError, TrainingHung, TrainingInterrupted, TrainingStopped
from megamoe.launch.environment import RankEnvironment, node_name
from megamoe.launch.server import end_process
from megamoe.runs import failures
from megamoe.runs.attempts import current_attempt
from megamoe.runs.events import append_event
from megamoe.training.build import Trainer
from megamoe.training.hooks import BaseHook
from megamoe.training.interruption import STOP_SIGNALS
from megamoe.training.step import StepResult
from megamoe.watchdog.bounded import within
from megamoe.watchdog.channel import Address
from megamoe.watchdog.judge import Limits, Verdict
from megamoe.watchdog.progress import Progress
from megamoe.watchdog.server import Server
from megamoe.watchdog.stacks import StackFile
from megamoe.watchdog.watch import Settings, Watch

VERDICT_WAIT_SECONDS = 5.0  # what a rank whose peer is lost waits to hear who it was; below the launcher's patience
RANKS_PER_POLL = 256  # of more ranks each is heard less often: rank 0 has other work, too
MAX_POLL_SECONDS = 4.0
RECORD_SECONDS = 4.0  # of a rank that is ended, for its files
_HELLO_BYTES, _HOST_BYTES = 1024, 128


class Supervision:
    """One rank's standing in the run. `attempt` is the number of this start of training."""

    def __init__(self, config: Config, environment: RankEnvironment, attempt: int | None) -> None:
        self.config, self.environment = config, environment
        self.run_dir, self.rank = config.run.dir, environment.rank
        self.attempt = attempt or current_attempt(self.run_dir)
        self.host = node_name()
        self.progress = Progress()
        self.watch: Watch | None = None

    def start(self, device: torch.device) -> None:
        """Agree on the attempt and start the watchdog. Collective over all ranks.

        Raises TopologyError where this rank does not reach rank 0 beside the process group.
        """
        settings, server = self._settings(), None
        hello: dict[str, Any] = {"attempt": self.attempt}
        if self.rank == 0:
            failures.clear(self.run_dir, self.attempt)
            if self.config.watchdog.enabled:
                server = self._start_server(settings)
                hello["address"] = vars(server.address)
        hello = _from_first(hello, device)
        self.attempt = hello["attempt"]
        if "address" not in hello:
            return
        folder = failures.attempt_folder(self.run_dir, "stacks", self.attempt)
        self.watch = Watch(
            self.rank, self.host, Address(**hello["address"]), settings, self.progress,
            StackFile(failures.rank_file(folder, self.rank, ".txt")), count_collectives=count_collectives,
            end=self._end_for_verdict, server=server,
        )  # fmt: skip
        try:
            self.watch.start()
        except OSError as error:
            address = self.watch.address
            raise TopologyError(
                f"the watchdog of rank {self.rank} on {self.host} does not reach that of rank 0 at {address.host} port "
                f"{address.port} ({error}): let ranks connect to each other's ports, or set watchdog.enabled false"
            ) from None

    def start_event(self, step: int, device: torch.device) -> None:
        """Tell the run's events that training begins. Collective over all ranks."""
        hosts = list(dict.fromkeys(_all_texts(self.host, device)))
        where = f"on {dist.get_world_size()} ranks of {len(hosts)} host{'s' if len(hosts) > 1 else ''}"
        self.event("start", f"training from step {step} {where}", attempt=self.attempt,
                   world_size=dist.get_world_size(), hosts=hosts, step=step)  # fmt: skip

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Of the first rank alone. A disk that does not take it is no reason to end."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                append_event(self.run_dir, kind, message, **details)

    def _settings(self) -> Settings:
        watchdog = self.config.watchdog
        timeout = hang_timeout_seconds(self.config)
        share = max(1.0, self.environment.world_size / RANKS_PER_POLL)
        poll = max(watchdog.poll_seconds, min(watchdog.poll_seconds * share, MAX_POLL_SECONDS))
        return Settings(timeout, max(timeout, watchdog.slow_timeout_seconds), min(poll, timeout / 3))

    def _start_server(self, settings: Settings) -> Server:
        is_local = self.environment.source in ("local", "single")
        host = "127.0.0.1" if is_local else urlsplit(self.environment.init_method).hostname or "127.0.0.1"
        server = Server(self.environment.world_size, Limits(settings.timeout_seconds), settings.poll_seconds,
                        host=host, everywhere=not is_local)  # fmt: skip
        server.start()
        return server

    def leave(self) -> None:
        if self.watch is not None:
            self.watch.leave()

    def fail(self, error: BaseException) -> PeerLost | None:
        """This rank ends in `error`: keep it, tell the others. Returns what to raise instead, for a consequence."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:  # it ends anyway, and a launcher that says so must not silence it
                signal.signal(number, signal.SIG_IGN)
        trace = "".join(traceback.format_exception(error))
        failure = self._describe(error, trace, self.progress.phase_of(error))
        failures.write_failure(self.run_dir, self.attempt, failure)
        waits = VERDICT_WAIT_SECONDS if failure.is_consequence else 0.0
        verdict = None
        if self.watch is not None:
            verdict = self.watch.fail(failure.message, is_consequence=failure.is_consequence, wait_seconds=waits)
        if verdict is not None:
            self._keep_for(verdict)
        self._tell(error)
        if not failure.is_consequence:
            return None
        who = verdict.message if verdict is not None and verdict.rank != self.rank else ""
        place = f"step {self.progress.step} ({failure.phase})"
        return PeerLost(
            f"rank {self.rank} on {self.host} ended in {place} because "
            + (who or f"another rank was lost: {failure.message.splitlines()[0]}")
        )

    def _tell(self, error: BaseException) -> None:
        """Once for all ranks: the event of the end. A launcher of this machine knows more, and does it itself."""
        if isinstance(error, TrainingStopped):
            if failures.claim_first(self.run_dir, self.attempt):
                append_safely(self.run_dir, "stopped", str(error), step=self.progress.step, attempt=self.attempt)
        elif self.environment.source != "local":
            first = failures.first_failure(self.run_dir, self.attempt)
            if first is not None and failures.claim_first(self.run_dir, self.attempt):
                failures.tell_first(self.run_dir, self.attempt, first)

    def _describe(self, error: BaseException, trace: str, phase: str) -> failures.RankFailure:
        return failures.describe(
            error, trace, rank=self.rank, host=self.host, step=self.progress.step, phase=phase,
            num_ranks=self.environment.world_size,
        )  # fmt: skip

    def _keep_for(self, verdict: Verdict) -> None:
        """On behalf of a rank that cannot write any more."""
        if verdict.kind == "failed" or failures.has_failure(self.run_dir, self.attempt, verdict.rank):
            return
        error = TrainingHung(verdict.message)
        failure = failures.describe(
            error, "", rank=verdict.rank, host=verdict.host, step=verdict.step, phase=verdict.phase,
            num_ranks=self.environment.world_size,
        )  # fmt: skip
        if verdict.kind == "died":
            failure = failures.as_death(failure, verdict.reason)
        failures.write_failure(self.run_dir, self.attempt, failure)

    def _end_for_verdict(self, verdict: Verdict) -> None:
        """End this process, whatever its training thread does, and whether the disk takes why or not. Runs on the
        watchdog's thread."""
        if verdict.kind != "hang":
            error: Exception = PeerLost(f"rank {self.rank} on {self.host} is ended because {verdict.message}")
            within(RECORD_SECONDS, lambda: self._record_end(error, verdict))
            end_process(error, say=True)
        speaks: list[bool] = []
        within(RECORD_SECONDS, lambda: self._record_hang(verdict, speaks))
        # Where nobody can say who speaks, the rank that hangs and the first one do.
        end_process(TrainingHung(verdict.message), say=speaks[0] if speaks else self.rank in (0, verdict.rank))

    def _record_end(self, error: Exception, verdict: Verdict) -> None:
        failures.write_failure(self.run_dir, self.attempt, self._describe(error, "", self.progress.phase))
        self._keep_for(verdict)
        self._tell(error)

    def _record_hang(self, verdict: Verdict, speaks: list[bool]) -> None:
        """On record; `speaks` gets whether this rank is the one that says it."""
        failure = self._describe(TrainingHung(verdict.message), "", self.progress.phase)
        if verdict.rank != self.rank:
            failure = failures.as_consequence(failure)
        failures.write_failure(self.run_dir, self.attempt, failure)
        speaks.append(failures.claim_first(self.run_dir, self.attempt))
        if speaks[0]:
            self._keep_for(verdict)
            first = failures.first_failure(self.run_dir, self.attempt)
            if first is not None:
                failures.tell_first(self.run_dir, self.attempt, first, kind="hang")
            with contextlib.suppress(OSError), open(Path(self.run_dir) / "log.txt", "a", encoding="utf-8") as log:
                log.write(f"{verdict.message}\n")


class StepMark(BaseHook):
    """Tells the watchdog of steps. Two of them stand around all hooks: what hooks do after a step belongs to it
    (`num_ahead` 0), what comes behind them to the next (1)."""

    def __init__(self, progress: Progress, num_ahead: int) -> None:
        self.progress, self.num_ahead = progress, num_ahead

    def on_start(self, trainer: Trainer) -> None:
        self.progress.step, self.progress.stage = trainer.step + 1, "first_step"

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.progress.step, self.progress.stage = trainer.step + self.num_ahead, "train"

    def on_roll_back(self, trainer: Trainer) -> None:
        self.progress.step = trainer.step + 1

    def on_end(self, trainer: Trainer) -> None:
        self.progress.step = trainer.step


@contextlib.contextmanager
def supervised(config: Config, environment: RankEnvironment, attempt: int | None) -> Iterator[Supervision]:
    """Inside, this rank is one of a run: an error is kept and told, and a rank that only lost its peer says so in one
    line (PeerLost)."""
    supervision = Supervision(config, environment, attempt)
    try:
        yield supervision
    except (TrainingInterrupted, KeyboardInterrupt):
        supervision.leave()
        raise
    except BaseException as error:
        instead = supervision.fail(error)
        if instead is not None:
            raise instead from error
        raise
    supervision.leave()


def count_collectives() -> dict[str, int]:
    """How many collectives this rank has called in each of its groups, by the groups' names, which all ranks share."""
    names = distributed_c10d._world.pg_names
    return {
        names[group]: group._get_sequence_number_for_group()
        for group in list(distributed_c10d._world.pg_map)
        if group.size() > 1
    }


def append_safely(run_dir: str, kind: str, message: str, **details: Any) -> None:
    with contextlib.suppress(OSError):
        append_event(run_dir, kind, message, **details)


def _from_first(tree: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The first rank's, on every rank. Collective over all ranks."""
    packed = _packed(json.dumps(tree), _HELLO_BYTES).to(device)
    dist.broadcast(packed, src=0)
    return json.loads(_unpacked(packed))


def _all_texts(text: str, device: torch.device) -> list[str]:
    """Every rank's, by rank. Collective over all ranks."""
    own = _packed(text, _HOST_BYTES).to(device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return [_unpacked(each) for each in everyone]


def _packed(text: str, num_bytes: int) -> torch.Tensor:
    return torch.tensor(list(text.encode()[:num_bytes].ljust(num_bytes, b"\0")), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> str:
    return bytes(packed.cpu().tolist()).rstrip(b"\0").decode("utf-8", errors="ignore")
