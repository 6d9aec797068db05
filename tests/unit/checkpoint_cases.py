"""Small checkpoints for tests: random tensors, cut at random into slices, dealt out to ranks, saved, loaded whole."""

import itertools
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint import commit as committing
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import STORAGE, Box, Slice, volume, whole_box
from megamoe.checkpoint.writer import write_rank
from megamoe.errors import SaveError

Key = tuple[str, str]
Piece = tuple[Box, int, int]
Tensors = dict[Key, tuple[str, np.ndarray]]  # (kind, name) -> dtype, elements

SMALL_BLOCK = 64  # bytes: small tensors then have several blocks


def random_cut(rng: random.Random, shape: tuple[int, ...], num_cuts: int) -> list[Piece]:
    """Boxes and flat ranges of them that hold every element once: cut along dimensions, then ranges within boxes."""
    boxes = [whole_box(shape)]
    pieces: list[Piece] = []
    for _ in range(num_cuts):
        box = boxes.pop(rng.randrange(len(boxes)))
        wide = [dim for dim, (start, stop) in enumerate(box) if stop - start > 1]
        if not wide:
            boxes.append(box)
            continue
        dim = rng.choice(wide)
        middle = rng.randrange(box[dim][0] + 1, box[dim][1])
        for edges in ((box[dim][0], middle), (middle, box[dim][1])):
            boxes.append((*box[:dim], edges, *box[dim + 1 :]))
    for box in boxes:
        size = volume(box)
        ends = sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(4)))})
        pieces += [(box, first, last) for first, last in itertools.pairwise(ends)]
    rng.shuffle(pieces)
    return pieces


def elements(array: np.ndarray, piece: Piece) -> np.ndarray:
    """What a piece of a global array holds, by plain indexing: the reference that slices are held to."""
    box, first, last = piece
    return array[tuple(slice(start, stop) for start, stop in box)].reshape(-1)[first:last].copy()


def random_tensors(rng: random.Random, step: int = 0) -> Tensors:
    """A few tensors of every kind and dtype; bits are random, NaN patterns included."""
    generator = np.random.default_rng(rng.randrange(1 << 31) + step)
    shapes = {"layers.0.experts.fc1.weight": (4, 6, 5), "embedding.weight": (24, 4), "final_norm.weight": (7,)}

    def bits(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        storage = STORAGE[dtype]
        raw = generator.integers(0, 256, math.prod(shape) * storage.itemsize, np.uint8)
        return raw.view(storage).reshape(shape)

    tensors: Tensors = {}
    for name, shape in shapes.items():
        tensors["weight", name] = ("BF16", bits("BF16", shape))
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensors[kind, name] = ("F32", bits("F32", shape))
    tensors["balance_bias", "layers.0.router"] = ("F32", bits("F32", (4,)))
    for rank in range(2):
        tensors["random", f"rank_{rank:05d}/cpu"] = ("U8", bits("U8", (40,)))
    return tensors


def deal_out(rng: random.Random, tensors: Tensors, num_ranks: int) -> list[list[tuple[Slice, np.ndarray]]]:
    """For every rank the slices it writes."""
    ranks: list[list[tuple[Slice, np.ndarray]]] = [[] for _ in range(num_ranks)]
    for (kind, name), (dtype, array) in tensors.items():
        for piece in random_cut(rng, array.shape, rng.randrange(4)):
            ranks[rng.randrange(num_ranks)].append(
                (Slice(kind, name, dtype, array.shape, *piece), elements(array, piece))
            )
    return ranks


def save(
    root: Path, step: int, tensors: Tensors, *, seed: int = 0, num_ranks: int = 2, keep_last: int = 10, **options: Any
) -> Path:
    """One whole save, rank after rank in this process."""
    save_id = options.pop("save_id", None) or f"s{step}x{os.urandom(4).hex()}"
    partial = committing.begin(root, step, save_id)
    for rank, slices in enumerate(deal_out(random.Random(seed), tensors, num_ranks)):
        try:
            write_rank(partial, rank=rank, save_id=save_id, step=step, slices=slices)
        except SaveError as error:
            committing.report_failure(partial, rank, str(error))
    arguments = {
        "state": {"samples": 10 * step, "loss": 1.5},
        "config": {},
        "layout": {"num_ranks": num_ranks},
        "keep_every_steps": None,
        "timeout_seconds": 5.0,
    }
    return committing.commit(
        root, partial, num_ranks=num_ranks, step=step, save_id=save_id, keep_last=keep_last, **arguments | options
    )


def load(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, whole, with all checks."""
    with Checkpoint.open(folder) as checkpoint:
        loaded = {}
        for key, entry in checkpoint.manifest.tensors.items():
            out = np.empty(math.prod(entry.shape), STORAGE[entry.dtype])
            checkpoint.read(entry.whole, out)
            loaded[key] = (entry.dtype, out.reshape(entry.shape))
        return loaded


def same(one: Tensors, other: Tensors) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(
        one[key][0] == other[key][0] and one[key][1].shape == other[key][1].shape
        and one[key][1].tobytes() == other[key][1].tobytes()
        for key in one
    )  # fmt: skip


def print_table(title: str, rows: Iterable[tuple[str, int, int, int, int, int]]) -> None:
    """injected / recovered exactly / detected and refused / lost / silent, and that the last two are 0."""
    rows = list(rows)
    heads = ("injected", "recovered exactly", "detected and refused", "lost", "silent")
    print(f"\n{title}\n{'fault':<34}{heads[0]:>10}{heads[1]:>19}{heads[2]:>22}{heads[3]:>6}{heads[4]:>8}")
    for name, injected, recovered, detected, lost, silent in rows:
        print(f"{name:<34}{injected:>10}{recovered:>19}{detected:>22}{lost:>6}{silent:>8}")
    for name, injected, recovered, detected, lost, silent in rows:
        assert lost == silent == 0, name
        assert injected > 0 and max(recovered, detected) == injected, name
