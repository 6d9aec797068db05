"""Where ranks run is settled before torch is loaded, from what the environment and the machine show."""

import os
from pathlib import Path

import pytest

from megamoe.errors import ConfigError
from megamoe.launch import devices
from megamoe.launch.devices import choose_device, hide_gpus, num_visible_gpus, settle_device
from megamoe.launch.environment import rank_environment


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("", 0), ("-1", 0), ("0", 1), ("0,1,2", 3), ("0,-1,2", 1), ("GPU-4f2a,GPU-77", 2)],
)
def test_environment_decides(visible: str, expected: int) -> None:
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_driver_folder_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(devices, "GPU_FOLDER", tmp_path)
    assert num_visible_gpus({}) == 2


def test_nvidia_smi_is_asked_where_there_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(devices, "GPU_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert num_visible_gpus({}) == 2
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 9\n")
    assert num_visible_gpus({}) == 0


@pytest.mark.parametrize(
    ("setting", "num_ranks", "visible", "one_gpu_each", "expected"),
    [
        ("auto", 8, "0,1,2,3,4,5,6,7", False, "cuda"),
        ("auto", 8, "0", False, "cpu"),  # a laptop with one GPU trains the quickstart's 8 ranks on its CPU
        ("auto", 1, "", False, "cpu"),
        ("auto", 1, "0", False, "cuda"),
        ("auto", 8, "0", True, "cuda"),  # srun --gpus-per-task 1
        ("auto", 8, "0,1", True, "cpu"),
        ("cpu", 1, "0", False, "cpu"),
        ("cuda", 4, "0,1,2,3", False, "cuda"),
    ],
)
def test_choice(setting: str, num_ranks: int, visible: str, one_gpu_each: bool, expected: str) -> None:
    env = {"CUDA_VISIBLE_DEVICES": visible}
    assert choose_device(setting, num_ranks, env, one_gpu_each=one_gpu_each) == expected


def test_too_few_gpus_for_what_was_asked() -> None:
    with pytest.raises(ConfigError) as error:
        choose_device("cuda", 8, {"CUDA_VISIBLE_DEVICES": "0"})
    assert str(error.value) == (
        "run.device cuda needs a GPU for each of the 8 ranks of this machine, and 1 is visible: "
        "start 1 ranks here, or use run.device cpu"
    )
    with pytest.raises(ConfigError, match=r"0 are visible: use run\.device cpu$"):
        choose_device("cuda", 2, {"CUDA_VISIBLE_DEVICES": ""})


def test_hidden_gpus_are_not_visible() -> None:
    env: dict[str, str] = {}
    hide_gpus(env)
    assert num_visible_gpus(env) == 0


def test_why_it_is_the_cpu_is_said_beside_results(capsys):
    """Stdout may be JSON."""
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    settle_device("auto", rank_environment({}), 2, env)
    told = capsys.readouterr()
    assert not told.out and told.err == "2 ranks share this machine, which shows 1 GPUs: running on the CPU\n"
