"""Slices are what plain numpy indexing says they are, and any cutting can be read from any other."""

import itertools
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megamoe.checkpoint import coverage, manifest
from megamoe.checkpoint.coverage import check_coverage
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import Slice, volume
from megamoe.errors import CheckpointError
from tests.unit.checkpoint_cases import SMALL_BLOCK, elements, load, random_cut, random_tensors, same, save

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
SEEDS = st.integers(0, 1 << 30)


def random_piece(rng: random.Random, shape: tuple[int, ...]):
    box = []
    for size in shape:
        start = rng.randrange(size)
        box.append((start, rng.randrange(start + 1, size + 1)))
    first = rng.randrange(volume(tuple(box)))
    return tuple(box), first, rng.randrange(first + 1, volume(tuple(box)) + 1)


@given(SHAPES, SEEDS)
@settings(max_examples=400, deadline=None)
def test_boxes_of_a_slice_are_its_elements_in_order(shape, seed):
    array = np.arange(np.prod(shape)).reshape(shape)
    piece = random_piece(random.Random(seed), shape)
    part = Slice("weight", "w", "I64", shape, *piece)
    assert len(part.boxes()) <= max(1, 2 * len(shape) - 1)
    found, expected_offset = [], 0
    for box, offset in part.boxes():
        assert offset == expected_offset
        expected_offset += volume(box)
        found.append(array[tuple(slice(a, b) for a, b in box)].reshape(-1))
    assert np.array_equal(np.concatenate(found), elements(array, piece))
    assert part.num_elements == expected_offset and part.num_bytes == 8 * expected_offset


@given(SHAPES, SEEDS, st.sampled_from([8, 64, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_any_slice_reads_from_any_cutting(shape, seed, block_bytes):
    rng = random.Random(seed)
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    tensors = {("weight", "w"): ("F32", array)}
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "BLOCK_BYTES", block_bytes)
        folder = save(Path(root), 1, tensors, seed=seed, num_ranks=3)
        with Checkpoint.open(folder) as checkpoint:
            checkpoint.verify()
            for piece in [random_piece(rng, shape), *random_cut(rng, shape, 3)]:
                target = Slice("weight", "w", "F32", shape, *piece)
                out = np.full(target.num_elements, np.nan, np.float32)
                checkpoint.read(target, out)
                assert np.array_equal(out, elements(array, piece)), (shape, seed, piece)


def test_a_number_without_dimensions_is_stored_and_read(tmp_path):
    tensors = {("weight", "scale"): ("F32", np.float32(2.5).reshape(()))}
    assert same(load(save(tmp_path, 1, tensors)), tensors)


def test_files_are_those_of_safetensors(tmp_path, monkeypatch):
    """The library reads each slice back under its label, in the stated dtype."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", SMALL_BLOCK)
    tensors = random_tensors(random.Random(1))
    folder = save(tmp_path, 100, tensors)
    entries = Checkpoint.open(folder).manifest
    num_slices = Counter()
    for number, file in enumerate(entries.files):
        with safe_open(folder / file.name, "np") as opened:
            assert opened.metadata()["step"] == "100" and opened.metadata()["format"] == manifest.FORMAT
            labels = set(opened.keys())
            for (kind, _name), entry in entries.tensors.items():
                for stored in entry.slices:
                    if stored.file != number:
                        continue
                    piece = entry.slice_of(stored)
                    labels.remove(piece.label)
                    num_slices[kind] += 1
                    assert stored.offset % 4 == 0 or piece.dtype in ("U8", "BF16")
                    assert opened.get_slice(piece.label).get_dtype() == piece.dtype
                    if piece.dtype == "F32":
                        array = tensors[kind, piece.name][1]
                        expected = elements(array, (stored.box, stored.first, stored.last))
                        assert opened.get_tensor(piece.label).tobytes() == expected.tobytes()
            assert not labels, "the file holds tensors that the manifest does not name"
    assert num_slices["weight"] >= 3 and num_slices["exp_avg"] >= 3
    assert same(load(folder), tensors)


@given(SHAPES, SEEDS, st.sampled_from(["drop", "twice", "grow", "shrink", "none"]))
@settings(max_examples=300, deadline=None)
def test_coverage_agrees_with_counting_every_element(shape, seed, damage):
    rng = random.Random(seed)
    pieces = random_cut(rng, shape, rng.randrange(6))
    victim = rng.randrange(len(pieces))
    box, first, last = pieces[victim]
    if damage == "drop":
        del pieces[victim]
    elif damage == "twice":
        pieces.append(pieces[victim])
    elif damage == "grow" and last < volume(box):
        pieces[victim] = (box, first, last + 1)
    elif damage == "shrink" and last - first > 1:
        pieces[victim] = (box, first + 1, last)
    counts = np.zeros(shape, int)
    flat = np.arange(counts.size).reshape(shape)
    for piece in pieces:
        counts.reshape(-1)[elements(flat, piece)] += 1
    if (counts == 1).all():
        check_coverage("w", shape, pieces)
    else:
        with pytest.raises(CheckpointError, match="w"):
            check_coverage("w", shape, pieces)


def test_coverage_is_quick_for_experts_cut_by_every_axis_and_by_zero():
    """512 experts on 64 expert ranks x 8 tensor ranks, each part cut in 7 at odd elements: 3584 slices."""
    shape, pieces = (512, 8192, 2048), []
    for expert in range(64):
        for tensor in range(8):
            box = ((8 * expert, 8 * expert + 8), (1024 * tensor, 1024 * tensor + 1024), (0, 2048))
            size = volume(box)
            ends = [size * i // 7 for i in range(8)]
            pieces += [(box, first, last) for first, last in itertools.pairwise(ends)]
    check_coverage("w", shape, pieces)
    box, first, last = pieces[-1]
    with pytest.raises(CheckpointError, match=r"element \[511, 8191, 2047\] of w is missing"):
        check_coverage("w", shape, [*pieces[:-1], (box, first, last - 1)])


def test_coverage_halves_a_grid_that_is_too_fine(monkeypatch):
    """Boxes with edges all over: more cells than are ever counted at once."""
    monkeypatch.setattr(coverage, "_MAX_CELLS", 50)
    size = 40
    pieces = [(((i, i + 1), (0, size), (0, size)), 0, size * size) for i in range(10)]
    pieces += [(((10, size), (i, i + 1), (0, size)), 0, 30 * size) for i in range(size)]
    check_coverage("w", (size, size, size), pieces)
    pieces.append((((0, 1), (5, 6), (7, 8)), 0, 1))
    with pytest.raises(CheckpointError, match=r"element \[0, 5, 7\] of w is held 2 times"):
        check_coverage("w", (size, size, size), pieces)
