"""What one process of a node can see of it: folders, disk, memory, data files, versions. No torch."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import megamoe
from megamoe.checkpoint.manifest import config_hash
from megamoe.config.schema import Config
from megamoe.data.indexed import IndexedDataset, bin_path
from megamoe.errors import DataError
from megamoe.plan.lifetime import checkpoint_bytes
from megamoe.preflight.findings import Finding

PROBE_BYTES = 1 << 20  # written into the run's folder
MEMORY_FILE = Path("/proc/meminfo")


def versions(config: Config | None) -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {"version of megamoe": megamoe.__version__, "version of Python": platform.python_version()}
    for package in ("torch", "deepspeed", "megatron-core", "numpy"):
        try:
            found[f"version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {package}"] = "none"
    if config is not None:
        found["configuration"] = config_hash(config.model_dump(mode="json"))[:12]
    return found


def check_node(node: str, config: Config | None, run_dir: Path | None, *, share_of_ranks: float) -> list[Finding]:
    """All figures of this node. `share_of_ranks`: of the job that run here."""
    findings = [*check_memory(node, config, share_of_ranks)]
    if run_dir is not None:
        findings += check_run_dir(node, run_dir, config)
    if config is not None and config.data.train:
        findings.append(check_data(node, config))
    return findings


def check_run_dir(node: str, run_dir: Path, config: Config | None) -> Iterator[Finding]:
    """A file is written and flushed there, and a checkpoint must fit."""
    probe = run_dir / f".preflight-{os.getpid()}-{time.monotonic_ns()}"
    started = time.monotonic()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        message = f"{run_dir} cannot be written on {node} ({error.strerror or error})"
        yield Finding("run.dir", node, "bad", message=message)
        return
    yield Finding("run.dir", node, "good", time.monotonic() - started, None, "seconds")
    needed = PROBE_BYTES if config is None else checkpoint_bytes(config)
    message = f"{run_dir} has {free / 2**30:.1f} GiB free on {node}, and a checkpoint takes {needed / 2**30:.1f}"
    is_bad = free < needed
    yield Finding(
        "free disk", node, "bad" if is_bad else "good", free, needed, "bytes", message if is_bad else ""
    )


def check_memory(node: str, config: Config | None, share_of_ranks: float) -> Iterator[Finding]:
    """Host memory that is free must hold what an asynchronous save copies there."""
    free = available_memory()
    if free is None:
        return
    copies = config is not None and config.checkpoint.async_save
    needed = int(checkpoint_bytes(config) * share_of_ranks) if copies and config is not None else 0
    message = f"{node} has {free / 2**30:.1f} GiB of memory free, and a save in the background takes "
    message += f"{needed / 2**30:.1f}"
    is_bad = free < needed
    yield Finding("free memory", node, "bad" if is_bad else "good", free, needed, "bytes", message if is_bad else "")


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        lines = MEMORY_FILE.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def check_data(node: str, config: Config) -> Finding:
    """Every dataset opens, and its last bytes can be read."""
    started = time.monotonic()
    for corpus in (*config.data.train, *config.data.valid, *config.data.test):
        try:
            IndexedDataset(corpus.path)
            with open(bin_path(corpus.path), "rb") as file:
                file.seek(-1, os.SEEK_END)
                file.read(1)
        except (DataError, OSError, ValueError) as error:
            return Finding("data", node, "bad", message=f"on {node}: {error}")
    return Finding("data", node, "good", time.monotonic() - started, None, "seconds")
