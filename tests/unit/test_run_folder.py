"""The layout of a run's folder: names, the newest checkpoint, and what is said where there is none."""

import os
import subprocess
import sys

import pytest

from megamoe.config import load_config
from megamoe.errors import CheckpointError, ConfigError
from megamoe.runs.run_folder import (
    checkpoint_at,
    checkpoint_name,
    checkpoints_path,
    prepare,
    resumable_checkpoints,
    step_of,
)


def make(run_dir, *steps: int, latest: str | bytes | None) -> None:
    for step in steps:
        (checkpoints_path(run_dir) / checkpoint_name(step)).mkdir(parents=True)
        (checkpoints_path(run_dir) / checkpoint_name(step) / "manifest.json").write_text("{}")
    if latest is not None:
        checkpoints_path(run_dir).mkdir(parents=True, exist_ok=True)
        (checkpoints_path(run_dir) / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())


def test_names_and_steps():
    assert checkpoint_name(100) == "step_00000100"
    for step in (0, 1, 99_999_999, 123_456_789):
        assert step_of(checkpoint_name(step)) == step
    for name in ("step_", "step_x1", "step_-0000001", "step_00000001.partial", ".step_00000001.partial", "latest", "7"):
        assert step_of(name) is None, name


def names(run_dir) -> list[str]:
    return [path.name for path in resumable_checkpoints(run_dir)]


def test_the_one_that_latest_names_comes_first_then_those_before_it(tmp_path):
    make(tmp_path, 10, 20, 30, latest="step_00000020\n")
    assert resumable_checkpoints(tmp_path)[0] == tmp_path / "checkpoints" / "step_00000020"
    assert names(str(tmp_path)) == ["step_00000020", "step_00000010"], "30 is of a run that was taken back"


def test_what_is_not_complete_does_not_count(tmp_path):
    assert names(tmp_path / "nothing") == []
    make(tmp_path, 10, 20, latest=None)
    (checkpoints_path(tmp_path) / "step_00000020" / "manifest.json").unlink()
    assert names(tmp_path) == ["step_00000010"]
    (tmp_path / "file").write_text("")
    assert names(tmp_path / "file") == []


def test_a_checkpoint_that_stood_aside_when_the_run_died_is_no_error(tmp_path):
    """The ranks put it back (`recover`); until then `latest` names what is not there under its name."""
    make(tmp_path, 10, 20, latest="step_00000020\n")
    folder = checkpoints_path(tmp_path) / "step_00000020"
    folder.rename(folder.with_name(".step_00000020.abc-1.aside"))
    assert names(tmp_path) == ["step_00000010"]


def test_weights_are_looked_for_in_a_run_folder_or_a_checkpoint(tmp_path):
    make(tmp_path, 10, 20, latest="step_00000010\n")
    assert checkpoint_at(tmp_path) == checkpoints_path(tmp_path) / "step_00000010"
    assert checkpoint_at(checkpoints_path(tmp_path) / "step_00000020").name == "step_00000020"
    for wrong in (tmp_path / "nothing", checkpoints_path(tmp_path) / "step_00000040"):
        with pytest.raises(CheckpointError, match=rf"checkpoint\.load_from {wrong} holds no checkpoint"):
            checkpoint_at(wrong)


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
        resumable_checkpoints(tmp_path)
    assert str(caught.value) == (
        f'{tmp_path}/checkpoints/latest names "{shown}", which is no checkpoint beside it: write the name of one '
        "of ['step_00000010', 'step_00000020'] into it, or remove it to start anew"
    )


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
    code = "import sys, megamoe.runs.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
