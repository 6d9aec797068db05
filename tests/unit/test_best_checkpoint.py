"""Which validation is the best, when to stop, and which checkpoint that keeps."""

import json
import math
from pathlib import Path

import pytest

from megamoe.checkpoint.folders import best_checkpoint, checkpoint_name, prune
from megamoe.config.schema import FinetuneConfig
from megamoe.errors import ConfigError
from megamoe.training.best import BestValidation


def best_of(by: str, values: list[float], limit: int | None = None) -> BestValidation:
    best = BestValidation(FinetuneConfig(best_by=by, stop_after_validations=limit))
    for number, value in enumerate(values, start=1):
        best.judge(number * 10, {f"valid_{by}": value})
    return best


@pytest.mark.parametrize(
    ("by", "values", "steps", "value", "num_since"),
    [
        ("loss", [3.0, 2.0, 2.5, 2.0], [10, 20], 2.0, 2),  # the first of equals
        ("accuracy", [0.5, 0.4, 0.6], [10, 30], 0.6, 0),
        ("loss", [math.nan, 2.0, math.nan], [20], 2.0, 1),
        ("loss", [math.nan], [], None, 1),
        ("loss", [math.inf, 1.0], [10, 20], 1.0, 0),
    ],
)
def test_judging(by, values, steps, value, num_since):
    best = best_of(by, values)
    assert (best.steps, best.value, best.num_since) == (steps, value, num_since)


def test_stopping():
    assert not best_of("loss", [2.0, 3.0], 2).has_stopped and best_of("loss", [2.0, 3.0, 2.0], 2).has_stopped
    assert not best_of("loss", [2.0, 3.0, 4.0]).has_stopped


def test_the_state_goes_on_and_another_measure_begins_anew():
    state = best_of("loss", [3.0, 2.0, 2.5]).state()
    same, other = (BestValidation(FinetuneConfig(best_by=by)) for by in ("loss", "accuracy"))
    same.restore(state)
    other.restore(state)
    assert same.state() == state and not same.judge(40, {"valid_loss": 2.0})
    assert other.steps == [] and other.judge(40, {"valid_accuracy": 0.1})


@pytest.mark.parametrize(
    ("keep_best", "left"),
    [
        ((), [40, 50]),
        ((10, 20), [20, 40, 50]),
        ((10, 30), [30, 40, 50]),
        ((10, 35), [10, 40, 50]),  # the better one could not be saved
        ((50,), [40, 50]),
        ((60,), [40, 50]),
    ],
)
def test_the_best_that_was_saved_is_spared(tmp_path: Path, keep_best, left):
    for step in (10, 20, 30, 40, 50):
        (tmp_path / checkpoint_name(step)).mkdir()
    prune(tmp_path, newest_step=50, save_id="a", keep_last=2, keep_every_steps=None, keep_best=keep_best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(step) for step in left]


def test_the_best_checkpoint_of_a_run_is_the_one_its_record_names(tmp_path: Path):
    for step in (8, 12):
        (tmp_path / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / checkpoint_name(step) / "manifest.json").touch()
    record = tmp_path / "finetune.json"
    for content in (None, "{", "[]", "{}", '{"best_step": null}', '{"best_step": "8"}'):
        if content is not None:
            record.write_text(content)
        with pytest.raises(ConfigError, match=r"^no .*/finetune.json names a best checkpoint: --best is for"):
            best_checkpoint(tmp_path)
    record.write_text(json.dumps({"best_step": 8}))
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000008"
    record.write_text(json.dumps({"best_step": 4}))
    with pytest.raises(ConfigError, match=r"step_00000004, the best checkpoint by .*/finetune.json, is not there any"):
        best_checkpoint(tmp_path)
