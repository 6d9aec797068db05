"""Mutation checks: with a guard on, damage is refused; with the same guard switched off, the same damage passes.

That shows two things: the guard is what catches it, and the tests of damage and crashes could fail. The flushes have
their mutation check in test_checkpoint_power.py.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamoe.checkpoint import commit as committing
from megamoe.checkpoint import files, folders, manifest, reader, strict_json
from megamoe.checkpoint.folders import checkpoint_name, complete_checkpoints, recover
from megamoe.checkpoint.manifest import MANIFEST
from megamoe.checkpoint.reader import Checkpoint
from megamoe.errors import CheckpointError
from tests.unit.checkpoint_cases import load, random_tensors, same, save
from tests.unit.test_checkpoint_crashes import SCENARIOS, die_at, points_of, run_and_die
from tests.unit.test_checkpoint_crashes import tensors_of as crash_tensors

TRUTH = random_tensors(random.Random(1))


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "checkpoints", 100, TRUTH)


def flip(path: Path, byte: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= bit
    path.write_bytes(content)


def reseal(folder: Path, forge: Callable[[dict], None]) -> None:
    path = folder / MANIFEST
    tree = strict_json.unseal(path.read_bytes(), "")
    forge(tree)
    path.write_bytes(strict_json.seal(tree))


def refused_with_the_guard_and_not_without(folder: Path, monkeypatch, module, guard: str, substitute):
    """What comes back once the guard is gone."""
    with pytest.raises(CheckpointError):
        load(folder)
    monkeypatch.setattr(module, guard, substitute)
    return load(folder)


def nothing(*_arguments, **_options) -> None:
    """A guard that is asleep."""


def test_without_block_checksums_wrong_values_come_back(folder, monkeypatch):
    path = next(folder.glob("exp_avg_rank_*"))
    flip(path, path.stat().st_size - 1)
    loaded = refused_with_the_guard_and_not_without(folder, monkeypatch, reader, "check_block", nothing)
    assert not same(loaded, TRUTH)


def test_without_header_checksums_a_damaged_header_passes(folder, monkeypatch):
    flip(next(folder.glob("weight_rank_*")), 20)
    refused_with_the_guard_and_not_without(folder, monkeypatch, reader, "check_header", nothing)


def test_without_the_seal_a_manifest_may_tell_another_story(folder, monkeypatch):
    path = folder / MANIFEST
    flip(path, path.read_bytes().index(b'"samples":1000') + len('"samples":'), bit=2)
    refused_with_the_guard_and_not_without(folder, monkeypatch, strict_json, "verify_seal", nothing)
    assert Checkpoint.open(folder).manifest.state["samples"] != 1000


def test_without_coverage_a_slice_may_stand_in_for_another(tmp_path, monkeypatch):
    """Two halves of equal size, the second said to be the first once more: as many elements as there should be."""
    tensors = {("weight", "w"): ("F32", np.arange(8, dtype=np.float32))}
    seed = next(s for s in range(100) if halves(save(tmp_path / str(s), 1, tensors, seed=s)))
    folder = tmp_path / str(seed) / checkpoint_name(1)

    def forge(tree: dict) -> None:
        one, other = tree["tensors"][0]["slices"]
        other[2:5] = one[2:5]

    reseal(folder, forge)
    loaded = refused_with_the_guard_and_not_without(folder, monkeypatch, manifest, "check_coverage", nothing)
    assert not same(loaded, tensors)


def test_a_read_counts_what_it_fills(folder, monkeypatch):
    """A guard behind the guard: without the checks of the manifest a hole is still no value."""

    def forge(tree: dict) -> None:
        next(tensor for tensor in tree["tensors"] if len(tensor["slices"]) > 1)["slices"].pop()

    reseal(folder, forge)
    monkeypatch.setattr(manifest.Manifest, "check", nothing)
    with pytest.raises(CheckpointError, match=r"fills .* elements of"):
        load(folder)


def halves(folder: Path) -> bool:
    slices = Checkpoint.open(folder).manifest.tensors["weight", "w"].slices
    return len(slices) == 2 and slices[0].last - slices[0].first == slices[1].last - slices[1].first


def test_without_promises_a_parameter_may_be_lost(folder, monkeypatch):
    def forge(tree: dict) -> None:
        tree["parameters"]["layers.0.lost.weight"] = [4]

    reseal(folder, forge)
    refused_with_the_guard_and_not_without(folder, monkeypatch, manifest, "check_promises", nothing)


def test_without_full_files_a_tensor_may_be_forgotten(folder, monkeypatch):
    def forge(tree: dict) -> None:
        tree["tensors"] = [tensor for tensor in tree["tensors"] if tensor["kind"] != "balance_bias"]

    reseal(folder, forge)
    loaded = refused_with_the_guard_and_not_without(folder, monkeypatch, manifest, "_check_files_are_filled", nothing)
    assert ("balance_bias", "layers.0.router") not in loaded


def test_without_the_name_check_a_manifest_reads_outside_its_folder(folder, monkeypatch):
    name = next(folder.glob("weight_rank_*")).name
    shutil.move(folder / name, folder.parent / name)

    def forge(tree: dict) -> None:
        next(file for file in tree["files"] if file["name"] == name)["name"] = f"../{name}"

    reseal(folder, forge)
    loaded = refused_with_the_guard_and_not_without(
        folder, monkeypatch, manifest, "check_file_name", lambda name, where: name
    )
    assert same(loaded, TRUTH), "the values came from outside"


def test_without_the_link_check_a_file_may_lie_outside(folder, monkeypatch, tmp_path):
    path = next(folder.glob("weight_rank_*"))
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert same(refused_with_the_guard_and_not_without(folder, monkeypatch, os, "O_NOFOLLOW", 0), TRUTH)


def test_without_strict_keys_the_last_of_two_wins(folder, monkeypatch):
    path = folder / MANIFEST
    body = path.read_bytes()[: -strict_json._SEAL_BYTES].replace(b'"samples":1000', b'"samples":1000,"samples":5')
    path.write_bytes(body + strict_json._HEAD + strict_json.checksum(body).encode() + strict_json._TAIL)
    refused_with_the_guard_and_not_without(folder, monkeypatch, strict_json, "_object", dict)
    assert Checkpoint.open(folder).manifest.state["samples"] == 5


def test_without_the_folder_check_a_stranger_may_stay(folder, monkeypatch):
    (folder / "extra_rank_00000.safetensors").write_bytes(b"x")
    refused_with_the_guard_and_not_without(folder, monkeypatch, reader.Checkpoint, "_check_folder", nothing)


def test_without_the_rename_at_the_end_a_death_takes_the_older_save_with_it(tmp_path, monkeypatch):
    """Written straight under its name, a save of the same step destroys the one that was there."""
    monkeypatch.setattr(os, "fsync", nothing)
    scenario = SCENARIOS["the same step again"]
    template = tmp_path / "template"
    for step in (1, 2):
        save(template, step, crash_tensors(step), seed=step)
    dying = points_of(scenario, template, tmp_path / "dry").index("file-written")

    def outcome(root: Path) -> str:
        shutil.copytree(template, root)
        assert run_and_die(scenario, root, die_at(dying)) is not None
        recover(root)
        newest = complete_checkpoints(root)[0]
        try:
            good = newest.name == checkpoint_name(2) and same(load(newest), crash_tensors(2))
        except CheckpointError:
            good = False
        return "kept" if good else "lost"

    assert outcome(tmp_path / "with") == "kept"
    monkeypatch.setattr(committing, "hidden_name", lambda step, save_id, role: checkpoint_name(step))
    assert outcome(tmp_path / "without") == "lost"


def two_saves_and_a_death(folder, scenario: str, point: str) -> None:
    """Steps 1 and 2 in folder/root, then a third save that dies at a fault point."""
    root, third = folder / "root", SCENARIOS[scenario]
    for step in (1, 2):
        save(root, step, crash_tensors(step), seed=step)
    run_and_die(third, root, die_at(points_of(third, root, folder / "dry").index(point)))


def test_without_recovery_a_death_between_the_renames_hides_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", nothing)
    two_saves_and_a_death(tmp_path, "the same step again", "aside-renamed")
    assert complete_checkpoints(tmp_path / "root")[0].name == checkpoint_name(1)
    assert recover(tmp_path / "root") == [
        "step_00000002 was being saved again when the run died: the older one is back"
    ]
    assert same(load(complete_checkpoints(tmp_path / "root")[0]), crash_tensors(2))


def test_without_the_announcement_a_complete_save_is_not_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", nothing)
    two_saves_and_a_death(tmp_path, "a new step", "folder-renamed")
    shutil.copytree(tmp_path / "root", tmp_path / "silent")
    (tmp_path / "silent" / folders.NEXT).unlink()
    for name, newest in (("root", 3), ("silent", 2)):
        recover(tmp_path / name)
        assert complete_checkpoints(tmp_path / name)[0].name == checkpoint_name(newest)


def test_without_the_name_going_first_a_death_while_pruning_leaves_half_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", nothing)

    def dies_inside(folder: Path) -> None:
        sorted(folder.iterdir())[-1].unlink()
        raise KeyboardInterrupt

    def half_there(root: Path) -> bool:
        for step in (1, 2):
            save(root, step, crash_tensors(step))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "remove_tree", dies_inside)
            with pytest.raises(KeyboardInterrupt):
                save(root, 3, crash_tensors(3), keep_last=2)
        found = [path for path in complete_checkpoints(root) if path.name == checkpoint_name(1)]
        try:
            return any(load(path) is None for path in found)
        except CheckpointError:
            return True

    assert not half_there(tmp_path / "with")
    monkeypatch.setattr(folders, "hidden_name", lambda step, save_id, role: checkpoint_name(step))
    assert half_there(tmp_path / "without")
    assert files.CHUNK_BYTES <= manifest.BLOCK_BYTES
