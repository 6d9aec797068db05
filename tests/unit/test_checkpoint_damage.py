"""Whatever happens to a checkpoint on disk is noticed before a value of it is used; what an enemy writes is refused."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint import strict_json
from megamoe.checkpoint.manifest import MANIFEST
from megamoe.checkpoint.reader import Checkpoint
from megamoe.errors import CheckpointError
from tests.unit.checkpoint_cases import SMALL_BLOCK, load, print_table, random_tensors, same, save

NUM_FLIPS = 520
SEED = 20261124
ROWS: list[tuple[str, int, int, int, int, int]] = []  # the table of this file, printed by its last test


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(manifests, "BLOCK_BYTES", SMALL_BLOCK)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "checkpoints", 100, random_tensors(random.Random(1)))


def verdict(folder: Path, truth) -> str:
    """ "recovered": all values right; "detected": refused; "silent": wrong values came back. Verify must agree."""
    try:
        loaded = load(folder)
    except CheckpointError as error:
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder).verify()
        return "detected" if "\n" not in str(error) else "detected, in more than a sentence"
    return "recovered" if same(loaded, truth) else "silent"


def record(name: str, verdicts: list[str]) -> None:
    """A row of the table: damage must be detected, whether or not the values happen to come back right."""
    ROWS.append((name, len(verdicts), 0, verdicts.count("detected"), 0, len(verdicts) - verdicts.count("detected")))
    assert set(verdicts) == {"detected"}, (name, verdicts)


def test_an_untouched_checkpoint_loads(folder):
    assert same(load(folder), random_tensors(random.Random(1)))
    Checkpoint.open(folder).verify()


def test_every_flipped_bit_is_noticed(folder):
    print(f"seed {SEED}")
    rng, truth, verdicts = random.Random(SEED), load(folder), []
    files = sorted(folder.iterdir())
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        size = path.stat().st_size
        # A third of them among the first bytes: headers, names, lengths.
        bit = rng.randrange(8 * (size if number % 3 else min(size, 512)))
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ (1 << bit % 8)]))
            file.flush()
            verdicts.append(verdict(folder, truth))
            file.seek(bit // 8)
            file.write(bytes([byte]))
    record("bit flip", verdicts)
    assert same(load(folder), truth)


def test_an_error_names_the_file_and_the_tensor(folder):
    entry = Checkpoint.open(folder).manifest
    stored = entry.tensors["exp_avg", "embedding.weight"].slices[0]
    path = folder / entry.files[stored.file].name
    with open(path, "r+b") as file:
        file.seek(stored.offset)
        byte = file.read(1)[0]
        file.seek(stored.offset)
        file.write(bytes([byte ^ 1]))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=rf"{path.name}: embedding.weight\[.* is damaged"):
        checkpoint.verify()
    seen = []
    good = checkpoint.entry("exp_avg_sq", "embedding.weight")  # other kinds are untouched
    checkpoint.read(good.whole, np.empty(good.whole.num_elements, np.float32))
    checkpoint.verify(sampled=0.0, progress=seen.append)
    assert sum(seen) == sum(file.size - file.header_bytes for file in entry.files)


def test_truncation_and_zeroed_tails_are_noticed(folder):
    rng, truth = random.Random(SEED), load(folder)
    cut, zeroed, longer = [], [], []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for keep in {0, 1, 7, len(content) // 2, len(content) - 1, *(rng.randrange(len(content)) for _ in range(10))}:
            path.write_bytes(content[:keep])
            cut.append(verdict(folder, truth))
            if any(content[keep:]):
                path.write_bytes(content[:keep] + bytes(len(content) - keep))
                zeroed.append(verdict(folder, truth))
        path.write_bytes(content + b"\0")
        longer.append(verdict(folder, truth))
        path.write_bytes(content)
    record("truncation", cut)
    record("zero-filled tail", zeroed)
    record("bytes appended", longer)


def test_missing_extra_and_swapped_files_are_noticed(folder):
    truth = load(folder)
    root = folder.parent
    # The same tensors, cut alike: files of equal size that differ in their save alone, or in their values alone.
    twin = save(root, 100_000_00, random_tensors(random.Random(1)))
    later = save(root, 200, random_tensors(random.Random(1), step=1))
    missing, extra, swapped, mixed = [], [], [], []
    for path in sorted(folder.iterdir()):
        kept = path.read_bytes()
        path.unlink()
        missing.append(verdict(folder, truth))
        for other in (twin, later):
            if (other / path.name).exists():
                shutil.copy(other / path.name, path)
                mixed.append(verdict(folder, truth))
        path.write_bytes(kept)
        stranger = path.with_name(f"x{path.name}")
        stranger.write_bytes(kept)
        extra.append(verdict(folder, truth))
        stranger.unlink()
    for path in sorted(folder.glob("*_rank_00000.safetensors")):
        other = folder / path.name.replace("rank_00000", "rank_00001")
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs), other.write_bytes(mine)
        swapped.append(verdict(folder, truth))
        path.write_bytes(mine), other.write_bytes(theirs)
    (folder / "subfolder").mkdir()
    extra.append(verdict(folder, truth))
    (folder / "subfolder").rmdir()
    record("missing file", missing)
    record("extra file", extra)
    record("files swapped between ranks", swapped)
    record("file of another save", mixed)
    assert same(load(folder), truth)


def test_links_and_pipes_are_not_followed(folder, tmp_path):
    truth, verdicts = load(folder), []
    for path in sorted(folder.iterdir()):
        outside = tmp_path / path.name
        shutil.move(path, outside)
        path.symlink_to(outside)
        verdicts.append(verdict(folder, truth))
        path.unlink()
        os.mkfifo(path)  # opening a pipe would wait for ever
        verdicts.append(verdict(folder, truth))
        path.unlink()
        path.mkdir()
        verdicts.append(verdict(folder, truth))
        path.rmdir()
        shutil.move(outside, path)
    record("link, pipe or folder for a file", verdicts)


class Canary:
    """Unpickling one makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_for_a_shard_or_manifest_is_refused_and_never_run(folder, tmp_path):
    truth, verdicts, canary = load(folder), [], tmp_path / "executed"
    payloads = [pickle.dumps(Canary(canary), protocol) for protocol in (0, 2, 5)]
    for path in sorted(folder.iterdir()):
        kept = path.read_bytes()
        for payload in payloads:
            for content in (payload, payload.ljust(len(kept), b"\0")):
                path.write_bytes(content)
                verdicts.append(verdict(folder, truth))
        path.write_bytes(kept)
    record("pickle for a file", verdicts)
    assert not canary.exists()
    pickle.loads(payloads[0])
    assert canary.exists(), "the canary itself is dead"


def first_tensor(tree: dict) -> dict:
    return next(t for t in tree["tensors"] if t["kind"] == "master" and len(t["slices"]) > 1)


def set_name(name) -> Callable[[dict], None]:
    def forge(tree: dict) -> None:
        tree["files"][0]["name"] = name

    return forge


def set_shape(shape) -> Callable[[dict], None]:
    def forge(tree: dict) -> None:
        first_tensor(tree)["shape"] = shape

    return forge


def set_column(column: int, value) -> Callable[[dict], None]:
    def forge(tree: dict) -> None:
        first_tensor(tree)["slices"][0][column] = value

    return forge


def set_key(key: str, value) -> Callable[[dict], None]:
    def forge(tree: dict) -> None:
        tree[key] = value

    return forge


def change(path: str) -> Callable[[dict], None]:
    """Forgeries that a line of code says best."""

    def forge(tree: dict) -> None:
        exec(path, {"tree": tree, "t": first_tensor(tree)})

    return forge


FORGERIES = {
    **{f"file name {name!r}": set_name(name) for name in (
        "../weight_rank_00000.safetensors", "/etc/passwd", "a/../weight_rank_00000.safetensors", "..", "",
        "manifest.json", "weight_rank_00000.safetensors\0", "weight_rank_00000.safetensors\n",
        "WEIGHT_rank_00000.safetensors",
        7, None, ["x"],
    )},
    **{f"shape {shape}": set_shape(shape) for shape in (
        [-4, 6, 5], [0, 6, 5], [1 << 62, 1 << 62], [1 << 70], [4.0, 6, 5], [True, 6, 5], ["4", 6, 5], [], [4, 6],
        [1] * 99, [4, 6, 6], [1 << 40, 6, 5], "4,6,5", None, [10**39],
    )},
    **{f"{what} {value!r}": set_column(column, value) for what, column, value in (
        ("file", 0, 99), ("file", 0, -1), ("file", 0, 0.0), ("file", 0, True), ("offset", 1, 0), ("offset", 1, -8),
        ("offset", 1, 1 << 61), ("offset", 1, 1 << 80), ("box", 2, []), ("box", 2, [[0, 9], [0, 9], [0, 9]]),
        ("box", 2, [[0, 1], [0, 1]]), ("box", 2, [[1, 0], [0, 6], [0, 5]]), ("box", 2, [[-1, 1], [0, 6], [0, 5]]),
        ("box", 2, [[0, 1, 2]] * 3), ("box", 2, None), ("first", 3, -1), ("first", 3, 10**6), ("last", 4, 10**6),
        ("last", 4, 0), ("last", 4, None), ("checksums", 5, []), ("checksums", 5, ["0" * 16] * 999),
        ("checksums", 5, ["x" * 16]), ("checksums", 5, [1]), ("checksums", 5, None),
    )},
    **{f"{key} {str(value)[:20]!r}": set_key(key, value) for key, value in (
        ("format", "other"), ("version", 2), ("version", "1"), ("step", -1), ("step", 1.5), ("step", None),
        ("save_id", "../x"), ("save_id", ""), ("save_id", 5), ("block_bytes", 0), ("block_bytes", 12),
        ("block_bytes", 1 << 40), ("config_hash", "0" * 32), ("config", {"model": {}}), ("config", []), ("state",
        []), ("layout", None),
        ("parameters", {}), ("parameters", []), ("parameters", {"x": [-1]}), ("files", {}), ("files", [{}]),
        ("files", [3]), ("tensors", {}), ("tensors", []), ("tensors", [None]), ("surprise", 1), ("versions", 3),
    )},
    "a key is missing": change("del tree['state']"),
    "a tensor twice": change("tree['tensors'].append(tree['tensors'][0])"),
    "a file twice": change("tree['files'].append(tree['files'][0])"),
    "a tensor less": change("tree['tensors'].remove(t)"),
    "a slice less": change("t['slices'].pop()"),
    "a slice twice": change("t['slices'].append(t['slices'][0])"),
    "a slice that overlaps": change("t['slices'][0][3:5] = t['slices'][1][3:5]; t['slices'][0][2] = t['slices'][1][2]"),
    "a promise that nothing keeps": change("tree['parameters']['layers.9.x'] = [4]"),
    "another dtype": change("t['dtype'] = 'F64'"),
    "an unknown dtype": change("t['dtype'] = 'O'"),
    "a kind that is no word": change("t['kind'] = 'a b'"),
    "a name that climbs": change("t['name'] = 'x\\n'"),
    "a size too small": change("tree['files'][0]['size'] -= 4"),
    "a size beyond numbers": change("tree['files'][0]['size'] = 10 ** 30"),
    "a header beyond the file": change("tree['files'][0]['header_bytes'] = tree['files'][0]['size'] + 1"),
    "a header too short": change("tree['files'][0]['header_bytes'] -= 8"),
}  # fmt: skip


def test_forged_manifests_with_a_right_checksum_are_refused(folder):
    """An enemy, or a bug of ours, can compute checksums: what the manifest says must hold together by itself."""
    path, truth = folder / MANIFEST, load(folder)
    kept, verdicts = path.read_bytes(), {}
    for name, forge in FORGERIES.items():
        tree = strict_json.unseal(kept, "")
        forge(tree)
        path.write_bytes(strict_json.seal(tree))
        verdicts[name] = verdict(folder, truth)
    path.write_bytes(kept)
    assert [name for name, outcome in verdicts.items() if outcome != "detected"] == []
    record("forged manifest", list(verdicts.values()))
    tree = strict_json.unseal(kept, "")
    path.write_bytes(strict_json.seal(tree))
    assert verdict(folder, truth) == "recovered", "sealing again, with nothing changed, is no forgery"


RAW_FORGERIES = {
    "duplicate key": lambda text: text.replace('"step":', '"step":1,"step":', 1),
    "duplicate key deep down": lambda text: text.replace('"dtype":', '"dtype":"F32","dtype":', 1),
    "NaN": lambda text: text.replace('"loss":1.5', '"loss":NaN'),
    "Infinity": lambda text: text.replace('"loss":1.5', '"loss":-Infinity'),
    "1e999": lambda text: text.replace('"loss":1.5', '"loss":1e999'),
    "NaN for a size": lambda text: text.replace('"size":', '"size":NaN,"was":', 1),
    "5000 digits": lambda text: text.replace('"loss":1.5', '"loss":' + "9" * 5000),
    "deep nesting": lambda text: text.replace('"loss":1.5', '"loss":' + "[" * 200_000 + "]" * 200_000),
    "deep nesting, open": lambda text: text.replace('"loss":1.5', '"loss":' + '{"a":' * 100_000),
    "no object": lambda text: "[" + text[1:],
    "rubbish at the end": lambda text: text + ",",
    "no UTF-8": lambda text: text.replace('"loss":1.5', '"loss":"\xff"'),
}


def test_json_that_could_be_read_in_two_ways_is_refused(folder):
    path, truth = folder / MANIFEST, load(folder)
    kept, verdicts = path.read_bytes(), []
    text = kept[: -strict_json._SEAL_BYTES].decode()
    for name, forge in RAW_FORGERIES.items():
        body = forge(text).encode("latin-1")
        assert body != text.encode(), name
        path.write_bytes(body + strict_json._HEAD + strict_json.checksum(body).encode() + strict_json._TAIL)
        verdicts.append(verdict(folder, truth))
    path.write_bytes(kept)
    record("ambiguous or absurd JSON", verdicts)


def test_a_checkpoint_of_nothing_and_one_that_is_no_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
            Checkpoint.open(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "file")


def test_what_is_read_must_be_what_is_stored(folder):
    checkpoint = Checkpoint.open(folder)
    entry = checkpoint.entry("master", "embedding.weight")
    with pytest.raises(CheckpointError, match="has no master nothing"):
        checkpoint.entry("master", "nothing")
    other = json.loads(json.dumps(entry.shape))[::-1]
    for wrong in (replace(entry.whole, shape=tuple(other), box=((0, 4), (0, 24))), replace(entry.whole, dtype="I32")):
        with pytest.raises(CheckpointError, match=r"embedding\.weight as F32"):
            checkpoint.read(wrong, np.empty(96, np.float32))
    for out in (
        np.empty(95, np.float32),
        np.empty((24, 4), np.float32),
        np.empty(96, np.float64),
        np.empty(192, np.float32)[::2],
    ):
        with pytest.raises(ValueError, match="out is"):
            checkpoint.read(entry.whole, out)


def test_the_table_of_damage():
    """Last on purpose: what the tests above have injected."""
    if not ROWS:
        pytest.skip("the tests that fill the table were not selected")
    print_table(f"Damage to a checkpoint (seed {SEED})", ROWS)
