"""The layouts shipped for the paper's models: found by the search, and planned as the files beside them say."""

import re
import sys
from pathlib import Path

import pytest

from megamoe.config.loading import load_config
from megamoe.config.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import write_layouts

PAPER = [name for name, preset in PRESETS.items() if preset.family == "paper"]


def num_gpus(name: str) -> int:
    text = (write_layouts.FOLDER / f"{name}.yaml").read_text()
    return int(re.search(r"fits (\d+) GPUs", text)[1])


def test_every_model_of_the_paper_has_one():
    assert sorted(path.stem for path in write_layouts.FOLDER.glob("*.yaml")) == sorted(PAPER)
    assert sorted(write_layouts.PAPER_GPUS) == sorted(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_its_plan_is_the_one_beside_it(name):
    config = load_config(str(write_layouts.FOLDER / f"{name}.yaml"))
    text = write_layouts.plan_text(config, num_gpus(name))
    assert text == (write_layouts.FOLDER / f"{name}.plan.txt").read_text(), "run python tools/write_layouts.py"
    assert "\nFITS: " in text
    need, memory = re.search(r"FITS: ([\d.]+) of ([\d.]+) GiB", text).groups()
    assert float(need) <= 0.95 * float(memory) + 0.05
    preset = load_config(name)
    assert config.model == preset.model and config.moe == preset.moe and config.optimizer == preset.optimizer
    assert config.run.global_batch_size == preset.run.global_batch_size
    assert f"run on {write_layouts.PAPER_GPUS[name]} GPUs" in PRESETS[name].summary
    assert num_gpus(name) >= write_layouts.PAPER_GPUS[name]


def test_the_search_still_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(write_layouts, "FOLDER", tmp_path)
    write_layouts.write("dense-125m")
    shipped = Path(__file__).parents[2] / "launch_scripts" / "layouts"
    for name in ("dense-125m.yaml", "dense-125m.plan.txt"):
        assert (tmp_path / name).read_text() == (shipped / name).read_text()
