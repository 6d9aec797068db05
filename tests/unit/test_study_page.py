"""The page of a study in a headless Chromium without a network, and what it says of ladders whose answer is known."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe.runs.events import append_event
from megamoe.study import write
from megamoe.study.charts import BOTTOM_EDGE, TOP, svg
from megamoe.study.html import html_study
from megamoe.study.ladder import study_runs
from megamoe.study.pictures import speedup_picture
from megamoe.study.points import read_points
from megamoe.study.rules import limits, rules
from megamoe.study.schema import AnalysisSettings, EvaluationSettings, LadderModel, StudySettings
from megamoe.study.speedup import analyse
from megamoe.study.tables import factor_table, model_table
from megamoe.study.training import Failure
from megamoe.study.write import csv_text, headline, picture_files
from tests.browser import Browser, BrowserMissing
from tests.unit.study_cases import SIZES, ladder

HOSTILE = '<script>alert("x")</script> & "quotes"'


@pytest.fixture(scope="module")
def browser():
    try:
        started = Browser()
    except BrowserMissing as error:
        pytest.skip(str(error))
    with started:
        yield started


def study_of(**analysis) -> StudySettings:
    models = tuple(
        LadderModel(name=f"{family}-{place}", family=family, settings={"model": {"hidden_size": 64 * (place + 1)}})
        for family in ("dense", "moe") for place in range(len(SIZES))
    )  # fmt: skip
    return StudySettings(
        name="known", num_tokens=4_096_000, common={"preset": "laptop-dense", "data": {"train": [{"path": "nowhere"}]}},
        models=models, evaluation=EvaluationSettings(sets="sets.yaml"), analysis=AnalysisSettings(**analysis),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """whole.html of a study that is done, empty.html of one that has nothing, troubled.html of one that failed."""
    folder = tmp_path_factory.mktemp("pages")
    study = study_of(num_replicates=100)
    runs = study_runs(study, "study.yaml")
    points = ladder(
        {"dense": 1.0, "moe": 4.0}, seeds={"dense-0": 3, "moe-0": 3}, deviation=0.005, text_se=0.005,
        out_of_domain={"dense": 1.0, "moe": 2.0},
    )  # fmt: skip
    troubles = [Failure("dense-2-seed1", "training", 3, HOSTILE, "x.log")]
    for name, found, failures, missing in (
        ("whole", points, [], []), ("empty", [], [], ["everything"]),
        ("troubled", [point for point in points if point.family == "dense"], troubles, ["moe-0-seed1"]),
    ):  # fmt: skip
        text = html_study(study, runs, found, analyse(found, study.analysis), failures, missing)
        (folder / f"{name}.html").write_text(text)
    for name, text in picture_files(study, points, analyse(points, study.analysis)):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["whole", "empty", "troubled"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_nothing_is_logged_or_asked_for_and_all_fits(browser, pages, tmp_path, name, width, dark):
    page = browser.open(pages / f"{name}.html", width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 27)") == dark
    assert page.problems == [] and page.requests == []
    assert page.screenshot(tmp_path / "page.png").stat().st_size > 8_000


def test_pictures_hold_what_they_say(browser, pages):
    page = browser.open(pages / "whole.html")
    titles = page.run("[...document.querySelectorAll('figure h3')].map(h => h.textContent)")
    assert titles == [
        text for domain in ("in domain", "out of domain")
        for text in (f"Loss {domain}", f"Compute saved {domain}", f"Learning curves {domain}", f"Time saved {domain}")
    ]  # fmt: skip
    inside = page.run(
        "[...document.querySelectorAll('figure svg[role=img]')].every(svg => [...svg.querySelectorAll('circle')]"
        ".every(c => c.cx.baseVal.value >= 50 && c.cx.baseVal.value <= 620 && c.cy.baseVal.value >= 0 "
        "&& c.cy.baseVal.value <= 380))"
    )
    assert inside, "no point lies outside of its picture"
    seeds = page.run("document.querySelectorAll('figure')[0].querySelectorAll('svg[role=img] circle title').length")
    assert seeds == 2 * len(SIZES) + 2 * 2, "every seed of every trained model is a point"
    assert page.run("document.querySelectorAll('figure')[1].querySelectorAll('.range').length") == 2
    names = page.run("[...document.querySelectorAll('.end')].map(t => t.textContent)")
    assert sorted(names) == sorted(2 * [f"{family}-{place}" for family in ("dense", "moe") for place in range(4)])
    boxes = page.run(
        "[...document.querySelectorAll('figure')[2].querySelectorAll('.end')].map(t => t.getBoundingClientRect())"
        ".map(r => [r.top, r.bottom, r.right]).sort((a, b) => a[0] - b[0])"
    )
    assert all(one[1] <= other[0] + 4 for one, other in itertools.pairwise(boxes)), "names do not overlap"


PICTURES = [
    f"{name}_{domain}.svg"
    for domain in ("in_domain", "out_of_domain") for name in ("loss", "speedup", "speedup_in_time")
]  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_are_files_of_their_own(browser, pages, tmp_path, dark):
    assert sorted(path.name for path in pages.glob("*.svg")) == sorted(PICTURES)
    for name in PICTURES:
        page = browser.open(pages / name, width=700, dark=dark)
        assert page.problems == [] and page.requests == []
        boxes = page.run(
            "[...document.querySelectorAll('text')].map(t => { const b = t.getBoundingClientRect(), "
            "s = document.documentElement.getBoundingClientRect(); "
            "return b.left >= s.left && b.right <= s.right && b.top >= s.top && b.bottom <= s.bottom })"
        )
        assert len(boxes) > 10 and all(boxes), f"{name}: a text is cut off"
        ground = page.run("getComputedStyle(document.querySelector('rect')).fill")
        assert (ground == "rgb(20, 23, 27)") == dark
        assert page.screenshot(tmp_path / "picture.png").stat().st_size > 8_000


def test_cards_and_words_tell_the_factor(pages):
    text = (pages / "whole.html").read_text()
    start = r"<dt>Compute, dense / moe, in domain</dt>"
    card = re.search(start + r"<dd>([\d.]+) ×</dd><small>90%: ([\d.]+) to ([\d.]+)", text)
    factor, low, high = (float(card[group]) for group in (1, 2, 3))
    assert low < 4.0 < high and factor == pytest.approx(4.0, rel=0.1)
    assert "90% interval" in text and "parametric bootstrap (seed 0)" in text
    assert "4 degrees of freedom" in text, "two models of three seeds"
    study = study_of(num_replicates=0)
    told = headline(study, analyse(ladder({"dense": 1.0, "moe": 4.0}), study.analysis))
    assert told[0].startswith("in domain, compute: dense takes 3.9") or told[0].startswith(
        "in domain, compute: dense takes 4.0"
    )


def test_texts_of_others_are_text(pages):
    text = (pages / "troubled.html").read_text()
    assert HOSTILE not in text and "&lt;script&gt;alert(&quot;x&quot;)" in text
    assert "moe has no point whose paper flops are known" in text and "moe has no power law: it takes" in text


RATES = ["inverse_sqrt_experts", 0.5, 1.0, 1.0]


def varied_study() -> StudySettings:
    """Mixtures by the paper's rule for their learning rate, or by another, and of a precision of their own."""
    study = study_of(num_replicates=20)
    models = [
        model if model.family == "dense" else model.model_copy(
            update={"settings": {
                "model": {"hidden_size": 64}, "optimizer": {"expert_lr_scale": RATES[place % 4]},
                "moe": {"num_experts": 4, "dropless": place % 4 > 0}, "run": {"precision": "bf16"},
            }}
        )
        for place, model in enumerate(study.models)
    ]  # fmt: skip
    return study.model_copy(update={"models": tuple(models), "may_differ": ("run.precision",)})


def test_rules_are_those_of_the_files_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = varied_study()
    runs = study_runs(study, "study.yaml")
    told = "\n".join(rules(study, runs))
    assert (
        "\nLearning rates: dense-0, dense-1, dense-2, dense-3: 0.001; moe-0: 0.001 (experts inverse_sqrt_experts); "
        "moe-1: 0.001 (experts 0.5 of it); moe-2, moe-3: 0.001 (experts 1 of it).\n"
    ) in told
    assert re.search(r"Training: dense-0, .*dense-3: batches of 16 [^;]*, fp32; moe-0, [^;]*, bf16\.\n", told)
    assert "experts of moe-0 have a capacity" in told
    assert "runs of one seed see the same samples in the same order" in told
    points = ladder({"dense": 1.0, "moe": 4.0})
    assert "Time is as measured; where the runs were trained is not recorded." in limits(study, runs, points)[-2]
    for run in runs:
        run.dir.mkdir(parents=True)
        append_event(run.dir, "start", "", world_size=1, hosts=["here"])
    assert limits(study, runs, points)[-2].startswith("Time is that of 1 rank of here. What mixtures pay")
    append_event(runs[-1].dir, "start", "", world_size=8, hosts=["there"])
    assert limits(study, runs, points)[-2].startswith(
        "Times are not of one place, and are to be compared with care: dense-0-seed1, "
    )
    assert "; moe-3-seed1 on 1 rank of here, then 8 ranks of there. " in limits(study, runs, points)[-2]
    assert html_study(study, runs, points, analyse(points, study.analysis), [], [])


def test_samples_that_differ_are_not_called_the_same():
    study = study_of(num_replicates=0)
    models = [
        model.model_copy(update={"settings": {"model": {"hidden_size": 64, "seq_length": 512 if place else 256},
                                              "run": {"global_batch_size": 8 if place else 16}}})
        for place, model in enumerate(study.models)
    ]  # fmt: skip
    study = study.model_copy(
        update={"models": tuple(models), "may_differ": ("model.seq_length", "run.global_batch_size")}
    )
    assert "the same samples" not in rules(study, study_runs(study, "study.yaml"))[0]


def test_points_are_written_before_the_page_is_made(tmp_path, monkeypatch):
    """What was measured is there, whatever becomes of the page."""
    def broken(*_):
        raise RuntimeError("no page")

    monkeypatch.setattr(write, "collect_points", lambda *_, **__: ladder({"dense": 1.0, "moe": 4.0}))
    monkeypatch.setattr(write, "html_study", broken)
    study = study_of(num_replicates=0).model_copy(update={"dir": str(tmp_path)})
    with pytest.raises(RuntimeError, match="no page"):
        write.write_study(study, study_runs(study, "study.yaml"), [])
    assert len(read_points(tmp_path / "study.jsonl")) == len(ladder({"dense": 1.0, "moe": 4.0}))


def test_memory_in_the_table_is_the_mean_that_the_factor_goes_by():
    points = ladder({"dense": 1.0, "moe": 4.0}, seeds={"dense-0": 2})
    moved = [
        replace(point, peak_memory_bytes=3 * 2**30 if point.seed == 2 else 2**30)
        for point in points if point.model == "dense-0"
    ]  # fmt: skip
    assert ">2.00 GiB<" in model_table(moved)


def test_an_open_interval_is_told_so_and_its_band_reaches_the_edge():
    study = study_of(num_replicates=100)
    points = ladder({"dense": 1.0, "moe": 4.0}, seeds={"dense-0": 3, "moe-0": 3}, deviation=0.02)
    factors = analyse(points, study.analysis)
    found = next(each for each in factors if each.method == "trained")
    assert math.isinf(found.high[0])
    assert f"<td>{found.low[0]:.2f} or more</td>" in factor_table(study, factors)
    row = csv_text(factors).splitlines()[1].split(",")
    assert (row[7], row[8]) == (repr(float(found.low[0])), ""), "empty on the open side"
    drawn = svg(speedup_picture(factors, study.analysis, "in_domain", "paper_flops"))
    band = re.search(r'<path class="range c2" d="M[\d.]+ ([\d.]+)L', drawn)
    assert float(band[1]) == TOP
    turned = AnalysisSettings(num_replicates=100, baseline="moe", compared="dense")
    down = svg(speedup_picture(analyse(points, turned), turned, "in_domain", "paper_flops"))
    edges = re.search(r'<path class="range c2" d="([^"]+)Z', down)[1]
    assert float(edges.split()[-1]) == BOTTOM_EDGE


def test_the_table_has_a_row_for_each_target():
    study = study_of(num_replicates=0, num_targets=7)
    rows = csv_text(analyse(ladder({"dense": 1.0, "moe": 4.0}), study.analysis)).splitlines()
    assert rows[0].split(",")[:4] == ["domain", "cost", "method", "target_nats_per_token"]
    assert sum(row.startswith("in_domain,paper_flops,trained,") for row in rows) == 7
    assert rows[1].split(",")[7:9] == ["", ""], "no replicates, no interval"
