"""A study of two dense models and two mixtures from beginning to end: killed, resumed, held against runs of their own.

Everything is a process of its own, as users start it; only that importing is done once for all (`tests.fork_server`).
"""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from megamoe.config.schema import TokenizerConfig
from megamoe.data.preprocess import PreprocessSettings, preprocess
from megamoe.runs.metrics import read_metrics
from megamoe.study.points import read_points
from megamoe.study.scoring import collect_points
from megamoe.study.speedup import analyse
from tests.browser import Browser, BrowserMissing
from tests.fork_server import ROOT, ForkServer
from tests.unit.study_cases import TINY_SETS, TINY_STUDY, load_tiny

VERSES = ROOT / "launch_scripts" / "quickstart_corpus" / "king_james_bible.txt"
KILLED_AT_STEP = 3
SECONDS = 100.0
MEASURED = ("train_seconds", "peak_memory_bytes")


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text, sets and the study's settings."""
    folder = tmp_path_factory.mktemp("study")
    text = VERSES.read_text()
    for name, part in (("train", text[:200_000]), ("held_out", text[300_000:303_000]), ("other", text[-3_000:])):
        (folder / f"{name}.txt").write_text(part)
    settings = PreprocessSettings(
        inputs=(str(folder / "train.txt"),), output=str(folder / "train"), tokenizer=TokenizerConfig(kind="byte"),
        rules="document", num_workers=1,
    )  # fmt: skip
    preprocess(settings)
    (folder / "sets.yaml").write_text(TINY_SETS)
    (folder / "study.yaml").write_text(TINY_STUDY)
    return folder


def without_times(points: list) -> list[dict]:
    return [{key: value for key, value in vars(point).items() if key not in MEASURED} for point in points]


@pytest.mark.timeout(240)
def test_a_study_that_was_killed_ends_with_the_same_numbers(server, place):
    pace = place / "moe-0-seed1.pace"
    pace.write_text(str(KILLED_AT_STEP))
    killed = server.start(["study", "study.yaml"], cwd=place)
    metrics = place / "runs/tiny/moe-0-seed1/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= KILLED_AT_STEP)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    pace.unlink()  # what it had started has been asked to save, and ends
    assert not (place / "runs/tiny/index.html").exists()

    done = server.run(["study", "study.yaml"], cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 5 runs are trained already" in done.stderr
    assert "run 3 of 5: moe-0-seed1 is trained" in done.stderr
    assert "evaluation 5 of 5: moe-1-seed1, 2 checkpoints: done" in done.stderr
    assert "in domain, compute: " in done.stdout and "out of domain, time: " in done.stdout
    assert done.stdout.splitlines()[-1] == "runs/tiny/index.html"
    resumed = read_points(place / "runs/tiny/study.jsonl")
    assert [(point.model, point.seed, point.step) for point in resumed] == [
        (model, seed, step) for model, seed in
        (("dense-0", 1), ("dense-0", 2), ("moe-0", 1), ("dense-1", 1), ("moe-1", 1)) for step in (4, 8)
    ]  # fmt: skip
    lines = read_metrics(metrics)
    assert [line["step"] for line in lines if "lm_loss" in line] == list(range(1, 9)), "no step stands there twice"

    unbroken = server.run(["study", "study.yaml", "--out", "runs/unbroken", "--only", "moe-0"], cwd=place)
    assert unbroken.returncode == 1, "the other runs are missing there"
    assert "missing: dense-1-seed1 is not trained to its end" in unbroken.stdout
    same = [point for point in resumed if point.model == "moe-0"]
    other = read_points(place / "runs/unbroken/study.jsonl")
    assert len(other) == 2 and without_times(other) == without_times(same)

    check_outputs(place, resumed)
    again = server.run(["study", "study.yaml"], cwd=place)
    assert again.returncode == 0 and "5 of 5 runs are trained already" in again.stderr
    assert "evaluation" not in again.stderr, "nothing is done twice"
    assert read_points(place / "runs/tiny/study.jsonl") == resumed
    (place / "sets.yaml").write_text(TINY_SETS.replace("verses", "lines"))
    other_sets = server.run(["study", "study.yaml"], cwd=place)
    assert other_sets.returncode == 2 and other_sets.stderr.endswith(
        "dense-0-seed1.json holds scores of other sets than sets.yaml names now: move runs/tiny/evaluations away, and "
        "all models are scored anew\n"
    )
    (place / "sets.yaml").write_text(TINY_SETS)


def wait_for(condition, seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come so far"
        time.sleep(0.02)


def check_outputs(place: Path, points: list) -> None:
    """The points are those of the runs' own records, and the table is that of the points."""
    study, runs = load_tiny(place)
    here = os.getcwd()
    os.chdir(place)
    try:
        assert collect_points(runs, study.folder, vocab_size=None) == points
    finally:
        os.chdir(here)
    first, last = points[0], points[1]
    lines = read_metrics(place / "runs/tiny/dense-0-seed1/metrics.jsonl")
    assert last.train_seconds == pytest.approx(sum(line["step_seconds"] for line in lines if "step_seconds" in line))
    results = json.loads((place / "runs/tiny/evaluations/dense-0-seed1.json").read_text())
    assert first.sets["verses"].nats_per_token == results["models"][0]["sets"][0]["nats_per_token"]
    assert (first.tokens, last.tokens, first.is_final, last.is_final) == (512, 1024, False, True)
    with open(place / "runs/tiny/speedup.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = analyse(points, study.analysis)
    assert len(rows) == sum(len(each.targets) for each in wanted)
    factors = [value for each in wanted for value in each.factors.tolist()]
    told = [float(row["factor"]) if row["factor"] else float("nan") for row in rows]
    assert told == pytest.approx(factors, nan_ok=True, rel=0, abs=0)


def test_a_run_that_fails_does_not_stop_the_others(server, place):
    """It wants a GPU; the report says so, and is written of the rest."""
    text = TINY_STUDY.replace("name: tiny", "name: broken").replace("seeds: [1, 2]", "seeds: [1]")
    text = text.replace("settings: {model: {hidden_size: 32}}", "settings: {run: {device: cuda}}").replace(
        "may_differ: []", "may_differ: [run.device]"
    )
    (place / "broken.yaml").write_text(text)
    words = ["--only", "dense-1", "--only", "moe-1-seed1"]
    done = server.run(["study", "broken.yaml", *words], cwd=place)
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if "failed after" in line]
    assert len(failed) == 1 and "run 1 of 2: dense-1-seed1 failed after" in failed[0] and "cuda" in failed[0]
    assert "run 2 of 2: moe-1-seed1 is trained" in done.stderr
    page = (place / "runs/broken/index.html").read_text()
    assert "training of dense-1-seed1 failed (exit code 2): megamoe: error: run.device" in page
    assert "missing: dense-0-seed1 is not trained to its end" in done.stdout
    assert [(point.model, point.step) for point in read_points(place / "runs/broken/study.jsonl")] == [
        ("moe-1", 4), ("moe-1", 8)
    ]  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_needs_nothing_and_logs_nothing(place, tmp_path, dark):
    path = place / "runs/tiny/index.html"
    assert path.exists(), "written by the first test"
    try:
        browser = Browser()
    except BrowserMissing as error:
        pytest.skip(str(error))
    with browser:
        page = browser.open(path, width=1280, dark=dark)
        assert page.problems == [] and page.requests == []
        assert page.run("document.documentElement.scrollWidth") <= 1280
        assert page.run("document.querySelectorAll('figure svg[role=img]').length") >= 6
        assert page.screenshot(tmp_path / "page.png", whole=True).stat().st_size > 20_000
