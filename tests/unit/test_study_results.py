"""The results of the laptop study that docs/studies/laptop holds follow from its lines and its file."""

import csv
import io
import re

import numpy as np
import pytest

from megamoe.study.ladder import study_runs
from megamoe.study.points import POINTS_FILE, read_points
from megamoe.study.schema import read_study
from megamoe.study.speedup import analyse
from megamoe.study.write import PAGE, PICTURES, SPEEDUP_FILE, csv_text, headline, picture_files
from tests.fork_server import ROOT

FOLDER = ROOT / "docs/studies/laptop"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.fixture(scope="module")
def study():
    return read_study(ROOT / "launch_scripts/studies/laptop.yaml")


@pytest.fixture(scope="module")
def points():
    return read_points(FOLDER / POINTS_FILE)


def test_every_checkpoint_of_the_file_is_there_at_its_cost(study, points):
    runs = study_runs(study, "laptop.yaml")
    expected = {
        (run.model.name, run.model.family, run.seed, step): (
            run.paper_flops(step * run.tokens_per_step, study.analysis.compute_vocab_size), run.num_parameters,
        )
        for run in runs for step in run.eval_steps
    }  # fmt: skip
    found = {
        (point.model, point.family, point.seed, point.step): (point.paper_flops, point.num_parameters)
        for point in points
    }
    assert found.keys() == expected.keys()
    for key, (flops, num_parameters) in expected.items():
        assert found[key] == (pytest.approx(flops, rel=1e-12), num_parameters)
    assert all(point.train_seconds and point.peak_memory_bytes and len(point.sets) == 3 for point in points)


def test_factors_pictures_and_words_follow_from_the_lines(study, points):
    factors = analyse(points, study.analysis)
    kept, again = (
        list(csv.DictReader(io.StringIO(text)))
        for text in ((FOLDER / SPEEDUP_FILE).read_text(), csv_text(factors))
    )
    assert len(kept) == len(again) > 100
    for one, other in zip(kept, again, strict=True):
        for column, value in one.items():
            if column in ("domain", "cost", "method") or not value:
                assert value == other[column]
            else:
                assert float(value) == pytest.approx(float(other[column]), rel=1e-6)  # fits differ by processor
    for name, text in picture_files(study, points, factors):
        kept_text = (FOLDER / PICTURES / name).read_text()
        assert NUMBER.sub("#", kept_text) == NUMBER.sub("#", text)
        drawn, drawn_again = ([float(number) for number in NUMBER.findall(each)] for each in (kept_text, text))
        assert drawn == pytest.approx(drawn_again, rel=1e-6, abs=0.11)  # a tenth of a pixel, by rounding
    told = " ".join((FOLDER / "README.md").read_text().split())
    for line in headline(study, factors):
        assert line in told
    inside, outside = (each for each in factors if (each.cost, each.method) == ("paper_flops", "trained"))
    told_low, told_out = inside.low[np.isfinite(inside.low)], np.isfinite(outside.low)
    assert "In domain every interval between trained models lies above 1" in told and (told_low > 1.0).all()
    assert "Out of domain every interval holds 1" in told
    assert ((outside.low < 1.0) & (outside.high > 1.0))[told_out].all() and told_out.any()
    assert f'open above ("{inside.interval_text(0)}" at the first)' in told
    assert "at the two hardest there is none" in told and np.isnan(inside.low).tolist() == 23 * [False] + 2 * [True]
    assert "There is no power law of mixtures" in told
    assert all(each.reason.startswith("moe has no power law") for each in factors if each.method == "fit")
    page = (FOLDER / PAGE).read_text()
    assert all(model.name in page for model in study.models)
