"""The launch scripts of the paper's models: up to date with their layouts, and what they submit fits."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.config.presets import PRESETS
from tests.unit.test_layout_presets import num_gpus

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import write_launch_scripts

PAPER = [name for name, preset in PRESETS.items() if preset.family == "paper"]


def test_every_model_of_the_paper_has_one_that_is_up_to_date(tmp_path, monkeypatch):
    shipped = write_launch_scripts.FOLDER
    monkeypatch.setattr(write_launch_scripts, "FOLDER", tmp_path)
    write_launch_scripts.main()
    assert sorted(path.stem for path in shipped.iterdir()) == sorted(PAPER)
    for name in PAPER:
        assert (shipped / f"{name}.sh").read_text() == (tmp_path / f"{name}.sh").read_text(), (
            "run python tools/write_launch_scripts.py"
        )
        assert os.access(shipped / f"{name}.sh", os.X_OK)


def command_of(name: str) -> list[str]:
    """What the script of a model gives to megamoe, in place of "$@" what a user would add."""
    text = (write_launch_scripts.FOLDER / f"{name}.sh").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("exec ")]
    words = shlex.split(line.replace("$root", str(write_launch_scripts.ROOT)))
    assert words[:4] == ["exec", "$python", "-m", "megamoe"] and words[-1] == "$@"
    return [*words[4:-1], "data.train=[{path: text}]", "--time", "24:00:00", "--dry-run"]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    for ending in (".bin", ".idx"):
        (tmp_path / f"text{ending}").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm.conf").touch()  # no SLURM of this machine has a say; a file that is not there is waited for
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    return tmp_path


@pytest.mark.parametrize("name", PAPER)
def test_its_dry_run_is_a_job_for_all_gpus_of_the_layout(name, work, capsys):
    assert main(command_of(name)) == 0
    script = capsys.readouterr().out
    for line in (f"--nodes={num_gpus(name) // 8}", "--gpus-per-node=8", "--ntasks-per-node=8", f"--job-name={name}"):
        assert f"#SBATCH {line}\n" in script
    assert f"run_dir={work}/runs/{name}\n" in script
    layout = load_config(str(write_launch_scripts.LAYOUTS / f"{name}.yaml"))
    assert layout.parallel.ranks_per_node in (None, 8)


def test_a_script_is_run(work):
    environment = dict(os.environ) | {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(write_launch_scripts.ROOT)}
    done = subprocess.run(
        ["bash", write_launch_scripts.FOLDER / "moe-15b.sh", "data.train=[{path: text}]", "--time", "60", "--dry-run"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=60\n" in done.stdout
