"""What is wrong with an input is said, by file or tensor, and nothing is written: flips, cuts, strangers, pickles."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.checkpoint import manifest as manifests
from megamoe.convert import to_hf
from megamoe.convert.foreign import MAX_HEADER_BYTES, open_source, read_header
from megamoe.convert.from_hf import import_
from megamoe.convert.to_hf import export
from megamoe.errors import CheckpointError, ConversionError
from megamoe.runs.run_folder import checkpoint_at
from tests.unit.checkpoint_cases import load, print_table, same
from tests.unit.executor_cases import (
    conversion_of,
    our_tensors,
    read_theirs,
    same_arrays,
    save_ours,
    theirs_by_hand,
    tiny_config,
    write_theirs,
)

SEED = 17
CONFIG = tiny_config()
TENSORS = our_tensors(CONFIG, seed=SEED)
ARRAYS = theirs_by_hand(TENSORS, "weight")
TABLE = conversion_of(CONFIG)
ROWS: list[tuple[str, int, int, int, int, int]] = []


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    monkeypatch.setattr(manifests, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(to_hf, "WINDOW_BYTES", 4096)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def theirs(tmp_path) -> Path:
    write_theirs(tmp_path / "theirs", ARRAYS, dict.fromkeys(ARRAYS, "F32"), num_files=3)
    return tmp_path / "theirs"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def verdict(run: Callable[[], None], out: Path, is_right: Callable[[Path], bool]) -> str:
    try:
        run()
    except (ConversionError, CheckpointError) as error:
        assert not out.exists()
        return "detected" if "\n" not in str(error) else "detected, in more than a sentence"
    finally:
        for path in out.parent.glob(f".{out.name}.*"):
            shutil.rmtree(path)
    found = "recovered" if is_right(out) else "silent"
    shutil.rmtree(out)
    return found


def test_every_flipped_bit_of_a_megamoe_checkpoint_is_noticed(tmp_path):
    print(f"seed {SEED}")
    source, rng, verdicts = save_ours(tmp_path / "run", CONFIG, TENSORS, seed=SEED), random.Random(SEED), []
    files = sorted(source.iterdir())
    for number in range(120):
        path = files[number % len(files)]
        # A third of them among the first bytes: headers, names, lengths.
        bit = rng.randrange(8 * (path.stat().st_size if number % 3 else min(path.stat().st_size, 512)))
        flip(path, bit)
        verdicts.append(
            verdict(
                lambda: export(source, tmp_path / "out", TABLE, dtype="fp32", workers=0, shard_bytes=20000),
                tmp_path / "out",
                lambda out: same_arrays(read_theirs(out)[0], ARRAYS),
            )
        )
        flip(path, bit)
    ROWS.append(
        ("bit of a megamoe checkpoint", 120, 0, verdicts.count("detected"), 0, 120 - verdicts.count("detected"))
    )
    assert set(verdicts) == {"detected"}
    export(source, tmp_path / "out", TABLE, dtype="fp32", workers=0)
    assert same_arrays(read_theirs(tmp_path / "out")[0], ARRAYS)


def test_a_flipped_bit_of_their_headers_and_index_never_gives_other_numbers(theirs, tmp_path):
    """Their numbers have no checksums; what says where they lie and what they are is noticed, or does not matter."""
    rng, verdicts = random.Random(SEED), []
    files = sorted(theirs.iterdir())
    for number in range(200):
        path = files[number % len(files)]
        data = path.read_bytes()
        size = len(data) if path.suffix == ".json" else 8 + int.from_bytes(data[:8], "little")
        bit = rng.randrange(64) if number % 10 == 1 and path.suffix != ".json" else rng.randrange(8 * size)
        flip(path, bit)
        verdicts.append(
            verdict(
                lambda: import_(theirs, tmp_path / "out", TABLE, workers=0),
                tmp_path / "out",
                lambda out: same(load(checkpoint_at(out)), TENSORS),
            )
        )
        path.write_bytes(data)
    detected, recovered = verdicts.count("detected"), verdicts.count("recovered")
    ROWS.append(
        ("header or index bit, or harmless", 200, 0, 200 - verdicts.count("silent"), 0, verdicts.count("silent"))
    )
    assert detected + recovered == 200 and detected > 150
    import_(theirs, tmp_path / "out", TABLE, workers=0)
    assert same(load(checkpoint_at(tmp_path / "out")), TENSORS)


def rewrite_header(path: Path, change: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    change(tree)
    text = json.dumps(tree).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewrite_index(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def swap_offsets(tree: dict) -> None:
    one, other = [item for name, item in tree.items() if name != "__metadata__"][:2]
    one["data_offsets"] = list(other["data_offsets"])
    one["shape"] = list(other["shape"])


def first(tree: dict) -> dict:
    return next(item for name, item in tree.items() if name != "__metadata__")


WRONG_HEADERS = {
    "an overlap": (swap_offsets, r"begins at byte \d+ of the tensors, but \d+ were before it"),
    "a dtype of no meaning": (
        lambda t: first(t).update(dtype="F8_E4M3"),
        r"has dtype 'F8_E4M3', which is not one of F64",
    ),
    "another size": (lambda t: first(t).update(shape=[3, 5]), r"of shape \[3, 5\] has \d+ bytes"),
    "a negative offset": (lambda t: first(t).update(data_offsets=[-4, 0]), "no lists of sizes"),
    "a float as size": (lambda t: first(t).update(shape=[1.0]), "no lists of sizes"),
    "true as size": (lambda t: first(t).update(shape=[True]), "no lists of sizes"),
    "an unknown key": (lambda t: first(t).update(extra=1), "is no dtype, shape and data_offsets"),
    "a huge shape": (lambda t: first(t).update(shape=[1 << 40, 1 << 40]), r"of shape .* has \d+ bytes"),
    "nothing in it": (lambda t: first(t).update(shape=[0], data_offsets=[0, 0]), "impossible shape"),
    "a table as text": (lambda t: t.update(__metadata__={"format": 1}), "no table of strings"),
    "a tensor too few": (lambda t: t.pop(next(n for n in t if n != "__metadata__")), "were before it|is truncated"),
}


@pytest.mark.parametrize("what", WRONG_HEADERS)
def test_a_wrong_header_is_refused_with_the_reason(what, theirs, tmp_path):
    change, message = WRONG_HEADERS[what]
    rewrite_header(theirs / "model-00002-of-00003.safetensors", change)
    with pytest.raises(ConversionError, match=message) as caught:
        import_(theirs, tmp_path / "out", TABLE, workers=0)
    assert "model-00002-of-00003.safetensors" in str(caught.value) and not (tmp_path / "out").exists()


def rename_in_index(tree: dict) -> None:
    tree["weight_map"]["model.strange"] = "model-00001-of-00003.safetensors"


def move_in_index(tree: dict) -> None:
    name = next(n for n, file in tree["weight_map"].items() if file.startswith("model-00001"))
    tree["weight_map"][name] = "model-00002-of-00003.safetensors"


def escape_in_index(tree: dict) -> None:
    tree["weight_map"]["embed.weight"] = "../model.safetensors"


WRONG_FOLDERS = {
    "a missing shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "00002-of-00003.* is missing"),
    "a shard left over": (
        lambda f: shutil.copy(f / "model-00002-of-00003.safetensors", f / "model-00004-of-00004.safetensors"),
        "model-00004-of-00004.safetensors is left over",
    ),
    "a name besides": (lambda f: rewrite_index(f, rename_in_index), "model.strange is not in .*00001-of-00003"),
    "a tensor elsewhere": (lambda f: rewrite_index(f, move_in_index), "is not in .*00002-of-00003|is in .*, but"),
    "a file outside": (lambda f: rewrite_index(f, escape_in_index), "which is no file beside it"),
    "no table": (lambda f: rewrite_index(f, lambda tree: tree.pop("weight_map")), "has no weight_map"),
    "two models": (
        lambda f: shutil.copy(f / "model-00002-of-00003.safetensors", f / "model.safetensors"),
        "which of them is meant",
    ),
    "a tensor twice": (
        lambda f: shutil.copy(f / "model-00002-of-00003.safetensors", f / "model-00001-of-00003.safetensors"),
        "is in .* and in .*: remove one of them",
    ),
    "a pipe": (
        lambda f: (
            (f / "model-00002-of-00003.safetensors").unlink(),
            os.mkfifo(f / "model-00002-of-00003.safetensors"),
        ),
        "is no plain file",
    ),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "no model is there"),
}


@pytest.mark.parametrize("what", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_with_the_reason(what, theirs, tmp_path):
    change, message = WRONG_FOLDERS[what]
    change(theirs)
    with pytest.raises(ConversionError, match=message):
        import_(theirs, tmp_path / "out", TABLE, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_every_cut_and_every_tail_is_noticed(theirs):
    path, rng, injected = theirs / "model-00001-of-00003.safetensors", random.Random(SEED), 0
    data = path.read_bytes()
    sizes = [0, 1, 7, 8, 9, len(data) - 1, len(data) + 1, *(rng.randrange(len(data)) for _ in range(60))]
    for size in sizes:
        path.write_bytes((data + b"x")[:size])
        with pytest.raises(ConversionError, match=r"model-00001-of-00003\.safetensors"):
            open_source(theirs)
        injected += 1
    ROWS.append(("cut or tail of their files", injected, 0, injected, 0, 0))
    for length in (MAX_HEADER_BYTES + 1, 1 << 63, 1):
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(ConversionError, match="does not fit"):
            read_header(path)


def test_a_file_that_is_cut_after_it_was_opened_is_noticed(theirs):
    source = open_source(theirs)
    name = max(source.tensors, key=lambda key: source.tensors[key].num_bytes)
    for path in theirs.glob("*.safetensors"):
        os.truncate(path, 100)
    with pytest.raises(ConversionError, match="it is truncated"):
        source.read(name, tuple((0, size) for size in source.tensors[name].shape))


def test_links_into_a_hub_cache_and_files_of_other_kinds_do_no_harm(theirs, tmp_path):
    (tmp_path / "blobs").mkdir()
    for path in theirs.glob("*.safetensors"):
        shutil.move(path, tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    (theirs / "consolidated.safetensors").write_bytes(b"of another library")
    import_(theirs, tmp_path / "out", TABLE, workers=0)
    assert same(load(checkpoint_at(tmp_path / "out")), TENSORS)


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_does_something_is_refused_and_not_run(legacy, tmp_path):
    folder, canary = tmp_path / "theirs", tmp_path / "canary"
    folder.mkdir()
    for payload in ({"a": _Bomb(canary)}, {"a": torch.zeros(2), "b": [_Bomb(canary)]}, _Bomb(canary)):
        torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        message = "no file of torch 1.6" if legacy else "holds the class or function"
        with pytest.raises(ConversionError, match=rf"pytorch_model\.bin (is )?{message}") as caught:
            import_(folder, tmp_path / "out", TABLE, workers=0)
        assert "\n" not in str(caught.value) and not canary.exists() and not (tmp_path / "out").exists()
    ROWS.append((f"pickle that runs code, {'legacy' if legacy else 'zip'}", 3, 0, 3, 0, 0))
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the bomb does go off where it is let
    assert canary.exists()


def test_bins_with_other_things_than_tensors_are_refused(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for payload, message in (
        ({"a": 1}, "should hold tensors by name, but a is int"),
        ([torch.zeros(2)], "should hold tensors by name, but has list"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "has dtype torch.complex64"),
        ({"a": torch.zeros(2, 0)}, "impossible shape"),
        ({"a": torch.zeros(2).to_sparse()}, "a is sparse or quantized"),
    ):
        torch.save(payload, folder / "pytorch_model.bin")
        with pytest.raises(ConversionError, match=message):
            open_source(folder)
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.arange(1000.0)}, path)
    data = path.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:size])
        with pytest.raises(ConversionError, match=r"pytorch_model\.bin (is no file of|is cut short|cannot be read)"):
            open_source(folder)


def test_a_bin_model_is_imported_by_processes(tmp_path):
    (tmp_path / "theirs").mkdir()
    names = sorted(ARRAYS)
    weight_map = {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(
            {name: torch.from_numpy(ARRAYS[name].copy()) for name in names[number::2]}, tmp_path / "theirs" / file
        )
        weight_map |= dict.fromkeys(names[number::2], file)
    (tmp_path / "theirs" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_(tmp_path / "theirs", tmp_path / "out", TABLE, workers=2)
    assert same(load(checkpoint_at(tmp_path / "out")), TENSORS)
    assert np.isfinite(TENSORS["weight", "final_norm.weight"][1]).all()


def test_the_table_of_damage():
    """Last on purpose: what the tests above have injected."""
    if not ROWS:
        pytest.skip("the tests that fill the table were not selected")
    print_table(f"Damaged inputs of a conversion (seed {SEED})", ROWS)
