"""What the fault tests share: runs of a few ranks on a server of their own, and what must hold after a fault."""

import atexit
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint.compare import differences
from megamoe.checkpoint.reader import Checkpoint
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.data.indexed import IndexedWriter
from megamoe.launch.environment import node_name
from megamoe.launch.local import LocalResult, RankServer
from megamoe.runs.attempts import current_attempt
from megamoe.runs.events import read_events
from megamoe.runs.failures import conclude, first_failure, read_failures
from megamoe.runs.run_folder import resumable_checkpoints, step_of
from megamoe.train_start import GRACE_SECONDS

PHASES = ("data", "forward", "all_to_all", "backward", "reduce", "update", "save", "validate")
HANGS = ("sleep", "stop", "gil")
DEATHS = ("kill", "raise", "exit")
TIMEOUT_SECONDS, SLOW_TIMEOUT_SECONDS = 3.0, 10.0
LAUNCH_SECONDS = 120.0
END_SECONDS = 25.0  # beyond its limit, within which a hang has ended all ranks also on a machine with more to do
MODULES = ("torch", "torch.distributed", "deepspeed", "megatron.core", "megamoe.training.main",
           "tests.parallel.fault_ranks")  # fmt: skip
SETTINGS = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.vocab_size=64",
    "model.seq_length=16", "moe.layer_pattern=1", "optimizer.warmup_steps=0",
    "optimizer.schedule=constant", "data.split=[0.8,0.2,0]", "run.micro_batch_size=1", "run.global_batch_size=4",
    "run.num_eval_batches=1", "run.eval_interval_steps=1", "monitor.log_interval_steps=5",
    "checkpoint.save_interval_steps=1", "checkpoint.async_save=false", "parallel.zero_stage=1",
    "parallel.timeout_seconds=60", f"watchdog.hang_timeout_seconds={TIMEOUT_SECONDS}", "watchdog.poll_seconds=0.2",
    f"watchdog.slow_timeout_seconds={SLOW_TIMEOUT_SECONDS}",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    kind: str
    phase: str
    rank: int

    @property
    def timeout_seconds(self) -> float:
        """A rank that saves or validates may stand still for longer, but not fall silent."""
        is_slow = self.kind == "sleep" and self.phase in ("save", "validate")
        return SLOW_TIMEOUT_SECONDS if is_slow else TIMEOUT_SECONDS

    def __str__(self) -> str:
        return f"{self.kind} in {self.phase} on rank {self.rank}"


def write_corpus(prefix: Path) -> Path:
    tokens = np.random.default_rng(5).integers(0, 64, 6_000)
    with IndexedWriter(prefix, 64) as writer:
        writer.add_documents(tokens.astype(writer.dtype), np.array([3_000, 3_000]))
    return prefix


def config_of(corpus: Path, run_dir: Path, *more: str) -> Config:
    base = run_dir.parent / "base.yaml"
    base.write_text("{}\n")
    return load_config(str(base), [*SETTINGS, f"data.train=[{{path: {corpus}}}]", f"run.dir={run_dir}", *more])


_servers: dict[int, RankServer] = {}


def server_of(number: int) -> RankServer:
    """Of this test session: chains that run at the same time have one each. What ranks share is imported once."""
    if number not in _servers or not _servers[number].is_alive():
        _servers[number] = RankServer(dict(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
        atexit.register(_servers[number].close)
        failure, _ = _servers[number].import_modules(MODULES)
        assert failure is None, failure.report
    return _servers[number]


class Launches:
    """Runs of one folder, one after another, each by the same command."""

    def __init__(self, config: Config, num_ranks: int, server: RankServer) -> None:
        self.config, self.num_ranks, self.server = config, num_ranks, server
        self.run_dir = Path(config.run.dir)
        self.seconds: float | None = None  # from the last fault to the end of all ranks

    def run(self, fault: Fault | None = None) -> LocalResult:
        """As `megamoe train --local-ranks` does it, into the fault."""
        payload: dict[str, Any] = {"config": self.config.model_dump(mode="json")}
        payload["attempt"] = current_attempt(self.run_dir)
        sprung = self.run_dir.with_suffix(".sprung")
        sprung.unlink(missing_ok=True)
        if fault is not None:
            payload["fault"] = vars(fault) | {"num_steps": 1, "sprung": str(sprung)}
        result = self.server.run(
            "tests.parallel.fault_ranks:run", payload, num_ranks=self.num_ranks, captured_ranks=range(self.num_ranks),
            timeout_seconds=LAUNCH_SECONDS, grace_seconds=GRACE_SECONDS,
        )  # fmt: skip
        self.seconds = time.time() - float(sprung.read_text()) if sprung.exists() else None
        if result.failure is not None:
            told = result.failure
            conclude(self.run_dir, payload["attempt"], kind=told.kind, rank=told.rank, message=told.message,
                     exit_code=told.exit_code, num_ranks=self.num_ranks)  # fmt: skip
        return result

    @property
    def newest_step(self) -> int:
        found = resumable_checkpoints(self.run_dir)
        return step_of(found[0].name) if found else 0

    def num_processes(self) -> int:
        """Ranks that the server still has."""
        command = ["ps", "-o", "pid=", "--ppid", str(self.server.process.pid)]
        return len(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())


def check(launches: Launches, fault: Fault) -> str:
    """Run into the fault, and hold what is told of it to what was done. Returns the report."""
    step, attempt = launches.newest_step + 1, current_attempt(launches.run_dir)
    result = launches.run(fault)
    report = result.failure.report if result.failure else "no failure"
    assert launches.seconds is not None, f"{fault}: was never reached: {report}"
    assert launches.num_processes() == 0, f"{fault}: a process is left"
    assert launches.seconds < fault.timeout_seconds + END_SECONDS, f"{fault}: {launches.seconds:.1f} s: {report}"
    if fault.kind == "term":
        assert (result.failure.kind, result.exit_code) == ("interrupted", 75), f"{fault}: {report}"
        assert read_events(launches.run_dir)[-1]["kind"] == "interrupted", fault
        return report
    first = first_failure(launches.run_dir, attempt)
    event = read_events(launches.run_dir)[-1]
    assert first is not None and first.rank == fault.rank == event["rank"], f"{fault}: {first} {event} {report}"
    assert event["kind"] == ("hang" if fault.kind in HANGS else "failed"), f"{fault}: {event}"
    assert (event["host"], event["attempt"], first.host) == (node_name(), attempt, node_name()), f"{fault}: {event}"
    if fault.kind in DEATHS:
        expected = {"kill": ("killed", 137), "raise": ("exception", 1), "exit": ("exit", 1)}[fault.kind]
        assert (result.failure.kind, result.exit_code) == expected, f"{fault}: {report}"
        assert result.failure.rank == fault.rank, f"{fault}: {report}"
    else:
        check_hang(launches, fault, result, attempt, step)
    records = [(each.rank, each.kind, each.step, each.message) for each in read_failures(launches.run_dir, attempt)]
    where = f"{fault}: after {launches.seconds:.1f} s in step {step}: {event} {records}"
    assert event["step"] is not None and event["step"] <= step + 1, where
    if fault.kind in ("kill", "exit"):  # where these were is known up to the last heartbeat, which may be steps ago
        assert event["phase"], where
    else:
        assert step <= event["step"] and event["phase"] == fault.phase, where
    return report


def check_hang(launches: Launches, fault: Fault, result: LocalResult, attempt: int, step: int) -> None:
    report = result.failure.report
    assert result.exit_code == 4 and report.count("\n") == 0, f"{fault}: {report}"
    assert report.startswith(f"megamoe: error: rank {fault.rank} on {node_name()} hangs in step "), f"{fault}: {report}"
    assert f" ({fault.phase}): " in report, f"{fault}: {report}"
    assert launches.seconds > fault.timeout_seconds, f"{fault}: after {launches.seconds:.1f} s already"
    folder = launches.run_dir / "stacks" / f"attempt_{attempt:04d}"
    stacks = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(stacks) == [f"rank_{rank:05d}.txt" for rank in range(launches.num_ranks)], f"{fault}: {list(stacks)}"
    for rank in range(launches.num_ranks):
        text = stacks[f"rank_{rank:05d}.txt"]
        if rank != fault.rank:
            assert "training/main.py" in text and "fault_ranks.py\", line" in text, f"{fault}: rank {rank}: {text}"
            assert "in come_to_grief" not in text
        elif fault.kind != "stop":
            assert "fault_ranks.py\", line" in text and "come_to_grief" in text, f"{fault}: {text}"


@dataclass(frozen=True)
class Chain:
    """Faults that one run's folder goes through, each launch resuming from what the last one left, to its end."""

    num_ranks: int
    layout: tuple[str, ...]
    faults: tuple[Fault, ...]


LAYOUTS = (
    (4, ("parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=2", "moe.num_experts=4")),
    (3, ("parallel.expert_parallel_size=3", "moe.num_experts=3", "run.global_batch_size=3")),
    (2, ("parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2", "moe.num_experts=4")),
)  # ranks, settings


def chains(kinds: tuple[str, ...]) -> list[Chain]:
    """Every kind in every phase once, on all layouts in turn and on all ranks."""
    points = [(kind, phase) for kind in kinds for phase in PHASES]
    found = []
    for number, (num_ranks, layout) in enumerate(LAYOUTS):
        own = points[number :: len(LAYOUTS)]
        faults = tuple(Fault(kind, phase, place % num_ranks) for place, (kind, phase) in enumerate(own))
        found.append(Chain(num_ranks, layout, faults))
    return found


def run_chains(root: Path, corpus: Path, all_chains: list[Chain]) -> int:
    """All at the same time: what they do most is wait. Returns the number of faults."""
    with ThreadPoolExecutor(len(all_chains)) as pool:
        started = [pool.submit(run_chain, root / str(number), corpus, chain, number) for number, chain in
                   enumerate(all_chains)]  # fmt: skip
        return sum(each.result() for each in started)


def run_chain(root: Path, corpus: Path, chain: Chain, number: int) -> int:
    """The run that came to grief again and again ends as the one that never did, to the bit."""
    root.mkdir()
    settings = (f"run.num_steps={len(chain.faults) + 2}", *chain.layout)
    launches = Launches(config_of(corpus, root / "run", *settings), chain.num_ranks, server_of(number))
    for fault in chain.faults:
        before, began = launches.newest_step, time.time()
        report = check(launches, fault)
        print(f"{time.time() - began:5.1f} s, {launches.seconds:4.1f} s after {fault}: {report.splitlines()[0]}")
        assert before <= launches.newest_step <= before + 2, fault
    unbroken = Launches(config_of(corpus, root / "unbroken", *settings), chain.num_ranks, launches.server)
    for each in (launches, unbroken):
        result = each.run()
        assert result.failure is None, result.failure.report
        assert read_events(each.run_dir)[-1]["kind"] == "end"
        assert not (each.run_dir / "stacks" / f"attempt_{current_attempt(each.run_dir) - 1:04d}").exists(), "of no use"
    one, other = (resumable_checkpoints(each.run_dir)[0] for each in (launches, unbroken))
    assert one.name == other.name
    with Checkpoint.open(one) as ours, Checkpoint.open(other) as theirs:
        assert list(differences(ours, theirs)) == []
    starts = [event for event in read_events(launches.run_dir) if event["kind"] == "start"]
    assert [event["attempt"] for event in starts] == list(range(1, len(chain.faults) + 2))
    assert all((e["world_size"], e["hosts"]) == (chain.num_ranks, [node_name()]) for e in starts)
    return len(chain.faults)
