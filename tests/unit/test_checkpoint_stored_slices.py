"""Slices of a manifest are taken at once exactly where each of them is taken alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.checkpoint.stored_slices import FileEntry, SliceReader
from megamoe.errors import CheckpointError

FILES = (FileEntry("weight_rank_00000.safetensors", 1000, 100, "0" * 16),) * 2
READER = SliceReader("weight", "w", "F32", (6, 8), FILES, 64, "here")
ODD = (-1, 0, 1, 2, 5, 48, 49, 999, 1 << 62, (1 << 62) + 1, 1 << 63, 1 << 70, True, 1.0, "1", None, [], [[0, 1]], {})


def good_slice(rng: random.Random) -> list:
    rows, columns = sorted(rng.sample(range(7), 2)), sorted(rng.sample(range(9), 2))
    volume = (rows[1] - rows[0]) * (columns[1] - columns[0])
    first = rng.randrange(volume)
    last = rng.randrange(first + 1, volume + 1)
    num_bytes = 4 * (last - first)
    digits = [f"{rng.getrandbits(64):016x}" for _ in range(-(-num_bytes // 64))]
    return [rng.randrange(2), rng.randrange(100, 1001 - num_bytes), [rows, columns], first, last, digits]


def spoilt(rng: random.Random, item: list) -> list:
    """`item` with one thing changed, which may leave it good."""
    place = rng.choice(["number", "edge", "pair", "box", "digits", "checksums", "length"])
    if place == "number":
        item[rng.choice((0, 1, 3, 4))] = rng.choice(ODD)
    elif place == "edge":
        item[2][rng.randrange(2)][rng.randrange(2)] = rng.choice(ODD)
    elif place == "pair":
        item[2][rng.randrange(2)] = rng.choice([(0, 1), [0], [0, 1, 2], *ODD])
    elif place == "box":
        item[2] = rng.choice([item[2][:1], item[2] + [[0, 1]], tuple(item[2]), *ODD])
    elif place == "digits":
        item[5][-1] = rng.choice(["0" * 15, "0" * 17, "G" * 16, "A" * 16, "0" * 16 + "\n", *ODD])
    elif place == "checksums":
        item[5] = rng.choice([item[5][:-1], item[5] + ["0" * 16], "0" * 16, *ODD])
    else:
        item = rng.choice([item[:5], [*item, 0], tuple(item), *ODD])
    return item


def is_taken_alone(item: list) -> bool:
    try:
        READER._one(item)
    except CheckpointError:
        return False
    return True


@given(st.integers(0, 1 << 60), st.integers(1, 5), st.booleans())
@settings(max_examples=1000, deadline=None)
def test_slices_are_taken_together_where_each_is_taken_alone(seed, num_slices, spoil):
    rng = random.Random(seed)
    items = [good_slice(rng) for _ in range(num_slices)]
    if spoil:
        at = rng.randrange(num_slices)
        items[at] = spoilt(rng, items[at])
    if all(is_taken_alone(item) for item in items):
        assert READER.read(items) == tuple(READER._one(item) for item in items)
        assert READER._all_are_good(items)
    else:
        assert spoil and not READER._all_are_good(items)
        with pytest.raises(CheckpointError, match=r"^here"):
            READER.read(items)


def test_a_number_has_one_slice_of_no_dimensions():
    scalar = SliceReader("weight", "w", "F32", (), FILES, 64, "here")
    good = [0, 100, [], 0, 1, ["0" * 16]]
    assert scalar._all_are_good([good]) and len(scalar.read([good])) == 1
    assert not scalar._all_are_good([[0, 100, [[0, 1]], 0, 1, ["0" * 16]]])
    assert scalar.read([]) == ()
