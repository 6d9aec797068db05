"""Speed and memory of conversions, against `cat` and fsync of the same bytes on one disk, in alternating runs.

    speed    export of a bf16 mixture-of-experts checkpoint, and import of what that made, from a cold cache
    memory   peak of all processes above the imports, at several sizes
    giant    the whole moe-1.1t shape, 2.2 TB of apparent size: real headers, files and index, holes for numbers

    python tools/benchmarks/convert.py
    python tools/benchmarks/convert.py --size-mb 4096 --memory-sizes-mb 1024 4096 8192
    python tools/benchmarks/convert.py --repeats 0 --giant

With --giant the numbers are holes in sparse files: they are read, checked and hashed as any others, and zeros are
written as holes again. It takes about 1 GB of disk and as long as hashing 2.2 TB twice takes.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint.commit import merge, write_manifest
from megamoe.checkpoint.layouts import holders, layout_of, slices_by_rank
from megamoe.checkpoint.manifest import FileEntry, Part, StoredSlice, TensorEntry
from megamoe.checkpoint.slices import Slice, whole_box
from megamoe.checkpoint.strict_json import checksum
from megamoe.checkpoint.writer import Save, part_name, write_streams
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.convert.links import Conversion, Link
from megamoe.convert.shards import SHARD_BYTES
from megamoe.convert.workers import BytesDone
from megamoe.topology.parameters import num_parameters, param_table

GOAL_SPEED, GOAL_BYTES, GOAL_MEMORY_MB, GOAL_SLOPE = 0.8, 1.02, 256, 1.0
GIANT_RANKS = 512


def model_of(size_mb: int) -> Config:
    """A model whose bf16 weights take about `size_mb`; wider ones for more, up to a width of 1024."""

    def sized(hidden: int, layers: int) -> Config:
        return load_config(
            "laptop-moe",
            [f"model.num_layers={layers}", f"model.hidden_size={hidden}", "moe.num_experts=16", "run.precision=bf16"],
        )

    def megabytes(config: Config) -> float:
        return 2 * num_parameters(param_table(config.model, config.moe)) / 1e6

    found = []
    for hidden in (256, 512, 1024):
        two, four = megabytes(sized(hidden, 2)), megabytes(sized(hidden, 4))
        found.append(sized(hidden, 2 * min(max(1, round(1 + (size_mb - two) / (four - two))), 100)))
    near = [config for config in found if abs(megabytes(config) - size_mb) < 0.25 * size_mb]
    return near[-1] if near else min(found, key=lambda config: abs(megabytes(config) - size_mb))


def table_of(config: Config) -> Conversion:
    """Every expert by itself, q, k and v by themselves, all else by its name."""
    links, theirs = [], {}
    ours = {("weight", p.name): p.shape for p in param_table(config.model, config.moe)}
    for key, shape in ours.items():
        name, rest = key[1], whole_box(shape[1:])
        if ".experts." in name:
            for e in range(shape[0]):
                theirs[f"model.{name}.{e}"] = shape[1:]
                links.append(Link(key, ((e, e + 1), *rest), f"model.{name}.{e}", rest))
        elif ".qkv." in name:
            groups = config.model.num_query_groups or config.model.num_attention_heads
            rows = shape[0] // groups
            head = rows // (config.model.num_attention_heads // groups + 2)
            for which, first, last in (("q", 0, rows - 2 * head), ("k", rows - 2 * head, rows - head),
                                       ("v", rows - head, rows)):  # fmt: skip
                size = last - first
                theirs[f"model.{name}.{which}"] = (groups * size, *shape[1:])
                for g in range(groups):
                    ours_box = ((g * rows + first, g * rows + last), *rest)
                    links.append(Link(key, ours_box, f"model.{name}.{which}", ((g * size, (g + 1) * size), *rest)))
        else:
            theirs[f"model.{name}"] = shape
            links.append(Link(key, whole_box(shape), f"model.{name}", whole_box(shape)))
    return Conversion(config, {}, ours, theirs, tuple(links))


def write_source(root: Path, config: Config, num_ranks: int = 2) -> Path:
    """A checkpoint of random bf16 numbers, as data-parallel ranks would write it."""
    entries = [TensorEntry("weight", p.name, "BF16", p.shape, ()) for p in param_table(config.model, config.moe)]
    folder = root / "step_00000001"
    folder.mkdir(parents=True)
    block = np.random.default_rng(0).integers(0, 0x7F00, manifests.BLOCK_BYTES // 2, np.uint16)

    def blocks(piece: Slice) -> Iterator[memoryview]:
        for first in range(0, piece.num_elements, len(block)):
            yield memoryview(block[: piece.num_elements - first].view(np.uint8))

    parts = []
    for rank, slices in enumerate(slices_by_rank(entries, holders(config, num_ranks), num_ranks)):
        sources = [(piece, functools.partial(blocks, piece)) for piece in slices]
        write_streams(Save(folder, rank, "bench", 1), sources)
        path = folder / part_name(rank)
        parts.append(Part.from_bytes(path.read_bytes(), str(path)))
    tree = config.model_dump(mode="json")
    write_manifest(folder, merge(parts, state={}, config=tree, layout=layout_of(config, num_ranks)))
    return folder


def write_sparse_source(root: Path, config: Config, num_ranks: int) -> Path:
    """The same of holes: every header, size and checksum is that of a file of zeros."""
    entries = [TensorEntry("weight", p.name, "BF16", p.shape, ()) for p in param_table(config.model, config.moe)]
    folder = root / "step_00000001"
    folder.mkdir(parents=True)
    zeros = memoryview(bytes(manifests.BLOCK_BYTES))

    @functools.cache
    def digest(size: int) -> str:
        return checksum(zeros[:size])

    parts = []
    for rank, slices in enumerate(slices_by_rank(entries, holders(config, num_ranks), num_ranks)):
        tree, end = {"__metadata__": {"rank": str(rank)}}, 0
        for piece in slices:
            tree[piece.label] = {
                "dtype": "BF16", "shape": [piece.num_elements], "data_offsets": [end, end + piece.num_bytes]
            }  # fmt: skip
            end += piece.num_bytes
        text = json.dumps(tree).encode()
        header = len(text).to_bytes(8, "little") + text
        name, offset = f"weight_rank_{rank:05d}.safetensors", len(header)
        tensors: dict[str, TensorEntry] = {}
        for piece in slices:
            sizes = [min(len(zeros), piece.num_bytes - at) for at in range(0, piece.num_bytes, len(zeros))]
            stored = StoredSlice(0, offset, piece.box, piece.first, piece.last, tuple(map(digest, sizes)))
            old = tensors[piece.name].slices if piece.name in tensors else ()
            tensors[piece.name] = TensorEntry("weight", piece.name, "BF16", piece.shape, (*old, stored))
            offset += piece.num_bytes
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(offset)
        files = (FileEntry(name, offset, len(header), checksum(header)),)
        parts.append(Part(rank, "bench", 1, len(zeros), files, tuple(tensors.values())))
    tree = config.model_dump(mode="json")
    write_manifest(folder, merge(parts, state={}, config=tree, layout=layout_of(config, num_ranks)))
    return folder


def copy(files: Sequence[Path], out: Path) -> None:
    """`cat` of the files into one, and fsync."""
    with open(out, "wb") as target:
        subprocess.run(["cat", *map(str, files)], stdout=target, check=True)
        os.fsync(target.fileno())


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(action: Callable[[], object]) -> float:
    os.sync()  # what was written or removed before is not to be paid for here
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure_speed(folder: Path, size_mb: int, num_repeats: int, workers: int | None) -> None:
    config = model_of(size_mb)
    source = write_source(folder / "source", config)
    num_mb = tensor_bytes(config) / 1e6
    print(f"speed: {num_mb:.0f} MB of bf16, {num_repeats} alternating runs, cold cache")
    print("  run |  export MB/s | cat+fsync | ratio | import MB/s | cat+fsync | ratio | read x, written x of each")
    rows = []
    for run in range(num_repeats):
        row = []
        out, back, copied = folder / f"out{run}", folder / f"back{run}", folder / "copied"
        bytes_by_kind = []
        for kind, origin, goal in (("export", source, out), ("import", out, back)):
            files = sorted(origin.glob("*.safetensors"))
            for turn in ((0, 1), (1, 0))[run % 2]:  # who goes first alternates
                drop_from_cache(origin)
                if turn:
                    row.append((turn, seconds(functools.partial(copy, files, copied))))
                    copied.unlink()
                else:
                    took, figures = run_child(kind, origin, goal, size_mb, workers)
                    row.append((turn, took))
                    size = sum(file.stat().st_size for file in files)
                    written = sum(file.stat().st_size for file in goal.rglob("*") if file.is_file())
                    bytes_by_kind.append((figures["read_bytes"] / size, figures["written_bytes"] / written))
            row[-2:] = [took for _, took in sorted(row[-2:])]
        shutil.rmtree(out), shutil.rmtree(back)
        rows.append(row)
        speeds = [num_mb / took for took in row]
        io = "  ".join(f"{read:.3f} | {written:.3f}" for read, written in bytes_by_kind)
        print(f"  {run:>3} | {speeds[0]:12.0f} | {speeds[1]:9.0f} | {speeds[0] / speeds[1]:5.2f} | {speeds[2]:11.0f} | "
              f"{speeds[3]:9.0f} | {speeds[2] / speeds[3]:5.2f} | {io}", flush=True)  # fmt: skip
    for at, what in ((0, "export"), (2, "import")):
        ratio = sum(row[at + 1] for row in rows) / sum(row[at] for row in rows)
        middle = statistics.median(row[at + 1] / row[at] for row in rows)
        verdict = "reached" if ratio >= GOAL_SPEED else "missed"
        print(f"  {what}: {ratio:.2f} x over all runs, median {middle:.2f} x, goal >= {GOAL_SPEED} x: {verdict}")
    print(f"  goal of bytes read and written: <= {GOAL_BYTES} x")


def tensor_bytes(config: Config) -> int:
    return 2 * num_parameters(param_table(config.model, config.moe))


def measure_memory(folder: Path, sizes_mb: Sequence[int], workers: int | None) -> None:
    print(
        f"memory: peak of all processes above the imports, MB; goal <= {GOAL_MEMORY_MB} + 2 x largest tensor of theirs"
    )
    print("  size MB | largest MB | export | import | goal")
    peaks: list[tuple[float, float, float]] = []
    for size_mb in sizes_mb:
        config = model_of(size_mb)
        source = write_source(folder / "memory", config)
        largest_mb = max(2 * int(np.prod(shape)) for shape in table_of(config).theirs.values()) / 1e6
        out, back = folder / "memory_out", folder / "memory_back"
        found = [
            run_child(kind, origin, goal, size_mb, workers, with_memory=True)[1]["peak_bytes"] / 1e6
            for kind, origin, goal in (("export", source, out), ("import", out, back))
        ]
        num_mb = tensor_bytes(config) / 1e6
        verdict = "reached" if max(found) <= GOAL_MEMORY_MB + 2 * largest_mb else "missed"
        print(f"  {num_mb:7.0f} | {largest_mb:10.1f} | {found[0]:6.0f} | {found[1]:6.0f} | {verdict}", flush=True)
        peaks.append((num_mb / 1e3, *found))
        for path in (source.parent, out, back):
            shutil.rmtree(path)
    if len(peaks) > 1:
        slopes = [np.polyfit([row[0] for row in peaks], [row[at] for row in peaks], 1)[0] for at in (1, 2)]
        verdict = "reached" if max(slopes) <= GOAL_SLOPE else "missed"
        print(f"  slope {slopes[0]:.2f} and {slopes[1]:.2f} MB per GB, goal <= {GOAL_SLOPE:g}: {verdict}")


def giant_config() -> Config:
    return load_config("moe-1.1t", [f"parallel.expert_parallel_size={GIANT_RANKS}"])


def measure_giant(folder: Path, workers: int | None) -> None:
    config = giant_config()
    started = time.perf_counter()
    source = write_sparse_source(folder / "giant", config, GIANT_RANKS)
    apparent = sum(file.stat().st_size for file in source.iterdir())
    print(f"giant: {apparent / 1e12:.3f} TB in {len(list(source.iterdir()))} files, made of holes in "
          f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    out = folder / "giant_out"
    took, figures = run_child("giant", source, out, 0, workers, with_memory=True)
    shards = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    size = sum(file.stat().st_size for file in shards)
    assert index["metadata"]["total_size"] == tensor_bytes(config) and len(set(index["weight_map"].values())) == len(
        shards
    )
    used = sum(file.stat().st_blocks * 512 for file in shards)
    largest_mb = max(2 * int(np.prod(shape)) for shape in table_of(config).theirs.values()) / 1e6
    print(f"  {len(shards)} shards, {len(index['weight_map'])} tensors, {size / 1e12:.3f} TB apparent")
    print(f"  {used / 1e6:.0f} MB on disk, {took:.0f} s, {size / took / 1e9:.2f} GB/s")
    print(f"  peak {figures['peak_bytes'] / 1e6:.0f} MB above the imports, largest tensor {largest_mb:.0f} MB; "
          f"goal <= {GOAL_MEMORY_MB + 2 * largest_mb:.0f}")  # fmt: skip
    print(f"  read {figures['read_bytes'] / apparent:.3f} x of the input")


def run_child(
    kind: str, source: Path, out: Path, size_mb: int, workers: int | None, *, with_memory: bool = False
) -> tuple[float, dict[str, float]]:
    """Convert in a process of its own: seconds of the conversion alone, and its figures."""
    os.sync()
    arguments = [kind, str(source), str(out), str(size_mb), str(workers), str(int(with_memory))]
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{kind} failed with exit code {done.returncode}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures.pop("seconds"), figures


class PeakOfTree:
    """The largest proportional set size of this process and its children, sampled."""

    def __enter__(self) -> "PeakOfTree":
        self.base = self.peak = tree_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.004):
            self.peak = max(self.peak, tree_bytes())


def tree_bytes() -> int:
    total = 0
    for pid in (os.getpid(), *children()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            total += 1024 * next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total


def children() -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]
    return []


def io_bytes() -> dict[str, int]:
    """Bytes of this process and of children that it has waited for."""
    with open("/proc/self/io", encoding="ascii") as file:
        rows = dict(line.split(": ") for line in file.read().splitlines())
    return {"read_bytes": int(rows["rchar"]), "written_bytes": int(rows["wchar"])}


def child(kind: str, source: Path, out: Path, size_mb: int, workers: int | None, with_memory: bool) -> None:
    from megamoe.convert.from_hf import import_
    from megamoe.convert.to_hf import export

    table = table_of(giant_config() if kind == "giant" else model_of(size_mb))
    base = tree_bytes()
    before, started = io_bytes(), time.perf_counter()
    with PeakOfTree() if with_memory else contextlib.nullcontext() as memory:
        if kind == "import":
            import_(source, out, table, workers=workers)
        else:
            # Several shards whatever the size: else a small model is written by fewer processes than a large one.
            shard_bytes = size_mb * 10**6 // 4 if with_memory and kind == "export" else SHARD_BYTES
            is_giant = kind == "giant"
            export(
                source, out, table, dtype="bf16", workers=workers, shard_bytes=shard_bytes, with_holes=is_giant,
                progress=functools.partial(say, [time.monotonic()], memory, base) if is_giant else None,
            )  # fmt: skip
    took, after = time.perf_counter() - started, io_bytes()
    figures = {key: after[key] - before[key] for key in after}
    if memory is not None:
        figures["peak_bytes"] = memory.peak - base
    print(json.dumps({"seconds": took, **figures}))


def say(said: list[float], memory: PeakOfTree, base: int, now: BytesDone) -> None:
    """A line each minute: it takes long."""
    if time.monotonic() - said[0] > 60 and now.seconds_left is not None:
        said[0] = time.monotonic()
        done, total = now.num_done_bytes / 1e9, now.num_total_bytes / 1e9
        left, peak = now.seconds_left / 60, (memory.peak - base) / 1e6
        text = f"  {done:.0f} of {total:.0f} GB, {left:.0f} min left, peak so far {peak:.0f} MB"
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-sizes-mb", type=int, nargs="*", default=[])
    parser.add_argument("--giant", action="store_true")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, source, out, size_mb, workers, with_memory = options.child
        num_workers = None if workers == "None" else int(workers)
        child(kind, Path(source), Path(out), int(size_mb), num_workers, with_memory == "1")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.repeats:
            measure_speed(Path(folder), options.size_mb, options.repeats, options.workers)
        if options.memory_sizes_mb:
            measure_memory(Path(folder), options.memory_sizes_mb, options.workers)
        if options.giant:
            measure_giant(Path(folder), options.workers)


if __name__ == "__main__":
    main()
