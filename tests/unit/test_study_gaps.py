"""What a study does without is said, in the list of what is missing and where it leaves a family without a factor."""

import pytest

from megamoe.study.states import saved_steps
from megamoe.study.write import write_study
from tests.unit.study_files import FINITE, end_run, lay_out, write_results


@pytest.fixture
def place(tmp_path, monkeypatch):
    return lay_out(tmp_path, monkeypatch)


def test_a_model_that_has_diverged_is_missing_and_is_why_there_is_no_factor(place):
    study, runs = place
    nothing, half = dict.fromkeys(FINITE), FINITE | {"verses": None}
    for run in runs:
        end_run(run)
        write_results(study, run, dict.fromkeys(run.eval_steps, FINITE))
    write_results(study, runs[2], {4: nothing, 8: nothing})
    told = write_study(study, runs, [])
    diverged = [f"missing: moe-0-seed1 has no finite loss on {name} at steps 4, 8" for name in ("verses", "letters")]
    assert list(told.lines[:2]) == diverged and not told.is_complete, "other mixtures are left, but not this one"
    assert "moe-0-seed1 has no finite loss on verses" in (study.folder / "index.html").read_text()
    write_results(study, runs[4], {4: FINITE, 8: half})
    lines = write_study(study, runs, []).lines
    assert lines[2] == "missing: moe-1-seed1 has no finite loss on verses at step 8"
    reason = "no factor, moe-0-seed1 has no finite loss on verses at steps 4, 8 (and 1 more)"
    assert [line for line in lines if line.startswith("in domain")] == [
        f"in domain, {what}: {reason}" for what in ("compute", "time")
    ]  # fmt: skip
    assert not any("finite" in line for line in lines if line.startswith("out of domain")), "there moe-1 has one"


def test_a_family_that_is_trained_and_not_evaluated_is_told_as_that(place, monkeypatch):
    study, runs = place
    for run in runs:
        end_run(run)
        if run.model.family == "dense":
            write_results(study, run, dict.fromkeys(run.eval_steps, FINITE))
    monkeypatch.setattr("megamoe.study.gaps.saved_steps", lambda run: [4, 8])
    lines = write_study(study, runs, []).lines
    assert lines[0] == "missing: moe-0-seed1 is not evaluated at steps 4, 8"
    assert "in domain, compute: no factor, moe-0-seed1 is not evaluated at steps 4, 8 (and 1 more)" in lines


def test_a_checkpoint_that_was_never_saved_comes_with_advice(place):
    study, runs = place
    for run in runs:
        end_run(run)
        write_results(study, run, dict.fromkeys(run.eval_steps, FINITE))
    write_results(study, runs[0], {8: FINITE})
    assert saved_steps(runs[0]) == []
    told = write_study(study, runs, [])
    assert told.lines[0] == (
        "missing: dense-0-seed1 has no checkpoint of step 4 to evaluate: remove runs/tiny/dense-0-seed1 to train it "
        "again"
    )
    assert not told.lines[1].startswith("missing") and not told.is_complete


def test_nothing_is_missing_where_all_is_evaluated(place):
    study, runs = place
    for run in runs:
        end_run(run)
        write_results(study, run, dict.fromkeys(run.eval_steps, FINITE))
    told = write_study(study, runs, [])
    assert told.is_complete and not any(line.startswith("missing") for line in told.lines)
