"""Speed and memory of checkpoints, against plain sequential I/O of the same bytes on one disk, in alternating runs.

    save   begin, write, checksums, fsync, commit       beside   write of the same bytes to one file and fsync
    load   manifest, headers, every slice, checksums    beside   read of one file of the same size
    peak memory above the imports of reading every slice and of `megamoe checkpoint reshard`, at several sizes

Files are flushed and dropped from the page cache before each read, so loads come from the disk. The state is that of a
model of the wanted size with fp32 weights and Adam moments, all views of one random buffer: it needs little memory.

    python tools/benchmarks/checkpoint.py
    python tools/benchmarks/checkpoint.py --size-mb 4096 --memory-sizes-mb 512 2048 8192
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megamoe.checkpoint.commit import begin, commit
from megamoe.checkpoint.layouts import holders, layout_of, slices_by_rank
from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import Slice
from megamoe.checkpoint.writer import write_rank
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.topology.parameters import num_parameters, param_table

KINDS = ("weight", "exp_avg", "exp_avg_sq")
CHUNK_BYTES = 16 << 20
RESHARDED = ("--ranks", "4", "parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2")
GOAL_SPEED, GOAL_MEMORY_MB = 0.8, 256


def model_of(size_mb: int) -> Config:
    """A model whose weights and moments take about `size_mb`: the widest that comes within a quarter of it."""

    def megabytes(config: Config) -> float:
        return 4 * len(KINDS) * num_parameters(param_table(config.model, config.moe)) / 1e6

    def sized(hidden: int, layers: int) -> Config:
        return load_config(
            "laptop-moe", [f"model.num_layers={layers}", f"model.hidden_size={hidden}", "moe.num_experts=8"]
        )

    found = []
    for hidden in (128, 256, 512, 1024):
        two, four = megabytes(sized(hidden, 2)), megabytes(sized(hidden, 4))
        pairs = min(max(1, round(1 + (size_mb - two) / (four - two))), 100)
        found.append(sized(hidden, 2 * pairs))
    near = [config for config in found if abs(megabytes(config) - size_mb) < 0.25 * size_mb]
    return near[-1] if near else min(found, key=lambda config: abs(megabytes(config) - size_mb))


def arrays_of(config: Config) -> list[tuple[Slice, np.ndarray]]:
    """What the one rank of a run would write, over one random buffer."""
    table = param_table(config.model, config.moe)
    entries = [TensorEntry(kind, p.name, "F32", p.shape, ()) for kind in KINDS for p in table]
    slices = slices_by_rank(entries, holders(config, 1), 1)[0]
    buffer = np.random.default_rng(0).random(max(piece.num_elements for piece in slices), dtype=np.float32)
    return [(piece, buffer[: piece.num_elements]) for piece in slices]


def save(root: Path, step: int, config: Config, slices: Sequence[tuple[Slice, np.ndarray]]) -> Path:
    save_id = f"bench{step}"
    partial = begin(root, step, save_id)
    write_rank(partial, rank=0, save_id=save_id, step=step, slices=slices)
    return commit(
        root, partial, num_ranks=1, step=step, save_id=save_id, state={}, config=config.model_dump(mode="json"),
        layout=layout_of(config, 1), keep_last=1000, keep_every_steps=None, timeout_seconds=60.0,
    )  # fmt: skip


def load(folder: Path, out: np.ndarray) -> None:
    """Read every slice as it was written, into the same memory again and again."""
    with Checkpoint.open(folder) as checkpoint:
        for entry in checkpoint.manifest.tensors.values():
            for stored in entry.slices:
                piece = entry.slice_of(stored)
                checkpoint.read(piece, out[: piece.num_elements])


def plain_write(path: Path, slices: Sequence[tuple[Slice, np.ndarray]]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _, array in slices:
        data = memoryview(array.view(np.uint8))
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            while len(chunk):
                chunk = chunk[os.write(descriptor, chunk) :]
    os.fsync(descriptor)
    os.close(descriptor)


def plain_read(path: Path, out: np.ndarray) -> None:
    data = memoryview(out.view(np.uint8))[:CHUNK_BYTES]
    with open(path, "rb", buffering=0) as file:
        while file.readinto(data):
            pass


def drop_from_cache(path: Path) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(action, *arguments) -> float:
    os.sync()  # what was written or removed before is not to be paid for here
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def measure_speed(folder: Path, size_mb: int, num_repeats: int) -> None:
    """Print a line for each alternating run and the medians."""
    config = model_of(size_mb)
    slices = arrays_of(config)
    num_mb = sum(piece.num_bytes for piece, _ in slices) / 1e6
    out = np.empty(max([CHUNK_BYTES // 4, *(piece.num_elements for piece, _ in slices)]), np.float32)
    print(f"speed: {num_mb:.0f} MB in {len(slices)} slices, {num_repeats} alternating runs")
    print("  run |  save MB/s | write+fsync | ratio |  load MB/s | plain read | ratio")
    rows = []
    for run in range(num_repeats):
        root, plain = folder / f"run{run}", folder / "plain"
        kept: list[Path] = []
        actions = [lambda: kept.append(save(root, 1, config, slices)), lambda: plain_write(plain, slices)]  # noqa: B023
        turn = 1 if run % 2 else -1  # who goes first alternates
        times = [seconds(action) for action in actions[::turn]][::turn]
        drop_from_cache(kept[0]), drop_from_cache(plain)
        actions = [lambda: load(kept[0], out), lambda: plain_read(plain, out)]  # noqa: B023
        times += [seconds(action) for action in actions[::turn]][::turn]
        shutil.rmtree(root), plain.unlink()
        rows.append([num_mb / t for t in times])
        show(str(run), rows[-1])
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    # Of the times in all: whoever goes first has an easier disk, and each goes first in half of the runs.
    ratios = [sum(1 / row[i + 1] for row in rows) / sum(1 / row[i] for row in rows) for i in (0, 2)]
    show("med", medians)
    for what, ratio in zip(("save", "load"), ratios, strict=True):
        verdict = "reached" if ratio >= GOAL_SPEED else "missed"
        print(f"  {what}: {ratio:.2f} x over all runs, goal >= {GOAL_SPEED} x: {verdict}")


def show(name: str, row: Sequence[float]) -> None:
    saved, written, loaded, read = row
    print(
        f"  {name:>3} | {saved:10.0f} | {written:11.0f} | {saved / written:5.2f} | "
        f"{loaded:10.0f} | {read:10.0f} | {loaded / read:5.2f}",
        flush=True,
    )


def peak_kib() -> int:
    """Largest resident set since this program was started."""
    with open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def measure_memory(folder: Path, sizes_mb: Sequence[int]) -> None:
    """Print the peaks of reading and resharding, each in a process of its own."""
    print(f"peak memory above the imports, MB; goal <= {GOAL_MEMORY_MB} + 2 x largest slice, flat in the size")
    print("  state MB | largest slice MB | read | reshard | goal")
    for size_mb in sizes_mb:
        config = model_of(size_mb)
        slices = arrays_of(config)
        num_mb = sum(piece.num_bytes for piece, _ in slices) / 1e6
        largest_mb = max(piece.num_bytes for piece, _ in slices) / 1e6
        source, out = save(folder / "memory", 1, config, slices), folder / "resharded"
        del slices
        peaks = [child_peak_mb("read", source), child_peak_mb("reshard", source, out)]
        verdict = "reached" if max(peaks) <= GOAL_MEMORY_MB + 2 * largest_mb else "missed"
        print(f"  {num_mb:8.0f} | {largest_mb:16.1f} | {peaks[0]:4.0f} | {peaks[1]:7.0f} | {verdict}", flush=True)
        shutil.rmtree(source), shutil.rmtree(out)


def child_peak_mb(what: str, *paths: Path) -> float:
    command = [sys.executable, __file__, "--child", what, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def child(arguments: Sequence[str]) -> None:
    """In a process of its own: do it, print the peak above the imports in MB."""
    from megamoe.cli import main

    what, *paths = arguments
    import megamoe.checkpoint.reshard  # noqa: F401

    base = peak_kib()
    if what == "read":
        with Checkpoint.open(Path(paths[0])) as checkpoint:
            for piece in pieces(checkpoint):
                checkpoint.read(piece, np.empty(piece.num_elements, np.float32))
    elif main(["checkpoint", "reshard", *paths, *RESHARDED]):
        sys.exit("reshard failed")
    print((peak_kib() - base) * 1024 / 1e6)


def pieces(checkpoint: Checkpoint) -> Iterator[Slice]:
    for entry in checkpoint.manifest.tensors.values():
        for stored in entry.slices:
            yield entry.slice_of(stored)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size-mb", type=int, default=512, help="bytes of the state for the speeds")
    parser.add_argument("--repeats", type=int, default=6, help="alternating runs, an even number")
    parser.add_argument("--memory-sizes-mb", type=int, nargs="*", default=[128, 512], help="sizes for the peaks")
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; default: that of temporary files")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="megamoe-checkpoint-") as name:
        if options.repeats:
            measure_speed(Path(name), options.size_mb, options.repeats)
        if options.memory_sizes_mb:
            measure_memory(Path(name), options.memory_sizes_mb)
    return 0


if __name__ == "__main__":
    sys.exit(main())
