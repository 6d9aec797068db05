"""The layout of a run's folder: names, the newest checkpoint, and what is said where there is none."""

import os
import subprocess
import sys

import pytest

from megamoe.config import load_config
from megamoe.errors import CheckpointError, ConfigError
from megamoe.training import run_folder
from megamoe.training.run_folder import (
    checkpoint_name,
    checkpoints_path,
    latest_checkpoint,
    prepare,
    step_of,
    write_atomically,
)


def make(run_dir, *steps: int, latest: str | bytes | None) -> None:
    for step in steps:
        (checkpoints_path(run_dir) / checkpoint_name(step)).mkdir(parents=True)
    if latest is not None:
        checkpoints_path(run_dir).mkdir(parents=True, exist_ok=True)
        (checkpoints_path(run_dir) / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())


def test_names_and_steps():
    assert checkpoint_name(100) == "step_00000100"
    for step in (0, 1, 99_999_999, 123_456_789):
        assert step_of(checkpoint_name(step)) == step
    for name in ("step_", "step_x1", "step_-0000001", "step_00000001.partial", ".step_00000001.partial", "latest", "7"):
        assert step_of(name) is None, name


def test_the_newest_is_the_one_that_latest_names(tmp_path):
    make(tmp_path, 10, 20, 30, latest="step_00000020\n")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000020"
    assert latest_checkpoint(str(tmp_path)) == tmp_path / "checkpoints" / "step_00000020"


def test_without_latest_there_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None
    make(tmp_path, 10, latest=None)  # the first save was interrupted before it counted
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "file").write_text("")
    assert latest_checkpoint(tmp_path / "file") is None


@pytest.mark.parametrize(
    ("latest", "shown"),
    [
        ("step_00000030", "step_00000030"),
        ("", ""),
        ("../../elsewhere", "../../elsewhere"),
        (".", "."),
        (b"step_\xff\n", "step_\ufffd"),
    ],
)
def test_a_latest_that_names_none_says_which_there_are(tmp_path, latest, shown):
    make(tmp_path, 20, 10, latest=latest)
    (checkpoints_path(tmp_path) / ".step_00000030.partial").mkdir()
    with pytest.raises(CheckpointError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value) == (
        f'{tmp_path}/checkpoints/latest names "{shown}", which is no checkpoint beside it: write the name of one '
        "of ['step_00000010', 'step_00000020'] into it, or remove it to start anew"
    )


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_atomically(path, "old")
    write_atomically(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["latest"]

    def crash(source, target):
        assert path.read_text(encoding="utf-8") == "new é", "until the new content is complete"
        raise InterruptedError

    monkeypatch.setattr(run_folder.os, "replace", crash)
    with pytest.raises(InterruptedError):
        write_atomically(path, "newer")
    assert path.read_text(encoding="utf-8") == "new é"


def test_a_prepared_folder_holds_the_resolved_config(tmp_path):
    config = load_config("quickstart", [f"run.dir={tmp_path}/a/run", "run.seed=11"])
    for _ in range(2):  # a resumed run finds it there
        prepare(config)
        assert load_config(str(tmp_path / "a" / "run" / "config.yaml")) == config
        assert sorted(os.listdir(tmp_path / "a" / "run")) == ["checkpoints", "config.yaml"]


def test_a_folder_that_cannot_be_made_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        prepare(load_config("quickstart", [f"run.dir={tmp_path}/file/run"]))
    assert str(caught.value) == (
        f"run.dir {tmp_path}/file/run cannot be written (Not a directory): choose a folder that can be made or "
        "written to"
    )


def test_no_torch():
    code = "import sys, megamoe.training.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
