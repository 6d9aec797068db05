"""A power failure at any point of a save: only what was flushed is left, and that is always a whole checkpoint.

A model of the disk stands in for one. It notes, at every fsync, the content of the file or the entries of the folder.
At every point of a save two worst cases are built from it: nothing survives that was not flushed; or names survive at
once, as on journaling file systems, and only contents are lost.
"""

import os
import random
import shutil
import stat
from pathlib import Path

import pytest

from megamoe.checkpoint import faults
from megamoe.checkpoint.folders import complete_checkpoints, recover
from megamoe.checkpoint.manifest import MANIFEST
from megamoe.errors import CheckpointError
from tests.unit.checkpoint_cases import Tensors, load, random_tensors, same, save


class Disk:
    """What would be left of the folders below `top` if the power failed now."""

    def __init__(self, top: Path, deaf_to: str | None = None) -> None:
        """`deaf_to`: files and folders with this in their name are not flushed, as if their fsync were left out."""
        self.top, self.deaf_to = top, deaf_to
        self.contents: dict[int, bytes] = {}  # by inode, at the last fsync
        self.entries: dict[int, dict[str, int]] = {}
        for folder, _, names in os.walk(top):
            self._note_folder(Path(folder))
            for name in names:
                self._note_file(Path(folder, name))

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self.deaf_to is not None and self.deaf_to in path.name:
            return
        if path.is_dir():
            self._note_folder(path)
        else:
            self._note_file(path)

    def _note_folder(self, path: Path) -> None:
        self.entries[path.stat().st_ino] = {name: os.lstat(path / name).st_ino for name in os.listdir(path)}

    def _note_file(self, path: Path) -> None:
        self.contents[path.stat().st_ino] = path.read_bytes()

    def nothing_unflushed(self, image: Path) -> None:
        """Names and contents as of their last fsync."""

        def build(inode: int, path: Path) -> None:
            if inode not in self.entries:
                path.write_bytes(self.contents.get(inode, b""))
                return
            path.mkdir()
            for name, child in self.entries[inode].items():
                build(child, path / name)

        build(self.top.stat().st_ino, image)

    def names_at_once(self, image: Path) -> None:
        """Names as they are, contents as of their last fsync."""
        image.mkdir()
        for folder, names, leaves in os.walk(self.top):
            target = image / Path(folder).relative_to(self.top)
            for name in names:
                (target / name).mkdir()
            for name in leaves:
                status = os.lstat(Path(folder, name))
                if stat.S_ISREG(status.st_mode):
                    (target / name).write_bytes(self.contents.get(status.st_ino, b""))


def tensors_of(step: int) -> Tensors:
    return {key: tensor for key, tensor in random_tensors(random.Random(1), step).items() if key[0] == "weight"}


class Outage:
    """A save during which the power fails at every point; counts what is found."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top, self.image = folder / "run", folder / "image"
        self.root = self.top / "checkpoints"
        self.monkeypatch = monkeypatch
        self.num_images = 0
        self.failures: list[str] = []

    def save_through(self, step: int, keep_last: int, deaf_to: str | None = None) -> None:
        for old in (1, 2):
            save(self.root, old, tensors_of(old), seed=old)
        disk = Disk(self.top, deaf_to)
        self.monkeypatch.setattr(os, "fsync", disk.fsync)
        truths = {"step_00000001": [tensors_of(1)], "step_00000002": [tensors_of(2)]}
        truths.setdefault(f"step_{step:08d}", []).append(tensors_of(30))

        def examine(point: str) -> None:
            for build in (disk.nothing_unflushed, disk.names_at_once):
                shutil.rmtree(self.image, ignore_errors=True)
                build(self.image)
                self.num_images += 1
                try:
                    root = self.image / "checkpoints"
                    faults.set_callback(None)
                    recover(root)
                    newest = complete_checkpoints(root)[0]
                    if not any(same(load(newest), truth) for truth in truths[newest.name]):
                        self.failures.append(f"{point}: {newest.name} holds wrong values")
                    if newest.name == "step_00000001":
                        self.failures.append(f"{point}: {newest.name} is too old")
                except (CheckpointError, IndexError, KeyError) as error:
                    self.failures.append(f"{point}: {error}")
                finally:
                    faults.set_callback(examine)

        faults.set_callback(examine)
        final = save(self.root, step, tensors_of(30), seed=5, save_id="dying", keep_last=keep_last)
        faults.set_callback(None)
        self.monkeypatch.undo()
        shutil.rmtree(self.image)
        disk.nothing_unflushed(self.image)
        try:
            newest = complete_checkpoints(self.image / "checkpoints")[0]
            assert newest.name == final.name and same(load(newest), tensors_of(30))
        except (CheckpointError, IndexError, AssertionError):
            self.failures.append("after the save: it is not on the disk")


@pytest.mark.parametrize(("step", "keep_last"), [(3, 9), (3, 1), (2, 2)], ids=["new", "pruning", "again"])
def test_power_may_fail_at_any_point(step, keep_last, tmp_path, monkeypatch):
    outage = Outage(tmp_path, monkeypatch)
    outage.save_through(step, keep_last)
    print(f"{outage.num_images} images of a disk after a power failure, {len(outage.failures)} without a whole save")
    assert outage.num_images > 60
    assert not outage.failures


@pytest.mark.parametrize("name", [".safetensors", MANIFEST, ".partial", "checkpoints"])
def test_without_a_flush_a_power_failure_loses_the_save(name, tmp_path, monkeypatch):
    """Mutation check: each fsync, left out, shows in the model of the disk."""
    outage = Outage(tmp_path, monkeypatch)
    outage.save_through(3, 1, deaf_to=name)
    assert outage.failures, f"nothing noticed that {name} is not flushed"
