"""Sums and the figures that come of them, held against arithmetic by hand; results.json gone on from and refused."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megamoe.config.loading import load_config
from megamoe.errors import ConfigError, OutputError
from megamoe.evaluation.plan import Capacity, checkpoints_of_run, taken_up
from megamoe.evaluation.results import Results, read_results
from megamoe.evaluation.sums import Sums, set_result, summary
from megamoe.evaluation.table import shown, table
from megamoe.evaluation.windows import Window
from megamoe.study.scoring import _scores

HEADER = {
    "sets": [{"name": "a", "domain": "near", "files": ["1"]}, {"name": "b", "domain": "far", "files": ["2"]}],
    "capacity": {"drops_tokens": False, "why": "default"},
    "layout": {"num_ranks": 2, "micro_batch_size": 1}, "precision": "fp32", "device": "cpu",
    "tokenizer": {"kind": "byte"},
}  # fmt: skip


def config_with(*overrides: str):
    return load_config("laptop-moe", overrides)


def window(unit: int, scored: int, ends: bool) -> Window:
    return Window(unit, 0, 0, scored, scored, True, ends)


def model(step: int, checksum: str = "c") -> dict:
    return {
        "checkpoint": f"runs/a/checkpoints/step_{step:08d}", "folder": f"f{step}", "step": step,
        "manifest_checksum": f"{checksum}{step}", "num_trained_tokens": 10 * step,
    }  # fmt: skip


def result(nats: float, tokens: int, num_bytes: int | None, error: float = 0.1) -> dict:
    sums = Sums(nats=nats, num_tokens=tokens, num_units=3)
    made = set_result(sums, num_documents=3, num_text_bytes=num_bytes)
    return made | {"nats_per_token_standard_error": error}


def test_the_standard_error_is_that_of_a_ratio_however_documents_are_cut():
    generator = np.random.default_rng(0)
    tokens, means = generator.integers(1, 50, 40), generator.uniform(2, 4, 40)
    sums, nats = Sums(), tokens * means
    for unit, (count, value) in enumerate(zip(tokens.tolist(), nats.tolist(), strict=True)):
        if count > 1:  # in two windows, of two calls
            sums.add([window(unit, 1, False)], [value / 4])
            sums.add([window(unit, count - 1, True)], [value * 3 / 4])
        else:
            sums.add([window(unit, count, True)], [value])
    mean = nats.sum() / tokens.sum()
    expected = math.sqrt((((nats - mean * tokens) ** 2).sum()) * 40 / 39) / tokens.sum()
    assert sums.standard_error == pytest.approx(expected, rel=1e-9)
    # Resampling whole documents says the same without any formula.
    draws = generator.integers(0, 40, (4000, 40))
    resampled = nats[draws].sum(1) / tokens[draws].sum(1)
    assert sums.standard_error == pytest.approx(resampled.std(), rel=0.08)
    assert Sums.from_json(json.loads(json.dumps(sums.to_json()))) == sums
    assert Sums(nats=1.0, num_tokens=1, num_units=1).standard_error is None


def test_figures_are_those_of_arithmetic_by_hand():
    made = result(2.0 * 50, 50, 80)
    assert made["nats_per_token"] == 2.0 and made["perplexity"] == pytest.approx(7.38905609893065)
    assert made["bits_per_byte"] == pytest.approx(100 / 0.6931471805599453 / 80)
    assert result(10.0, 10, None)["bits_per_byte"] is None
    assert result(1e6, 10, None)["perplexity"] is None  # beyond every number


def test_domains_weigh_by_tokens_and_by_bytes():
    sets = [
        result(100.0, 50, 80, 0.2) | {"domain": "near"}, result(30.0, 10, 70, 0.1) | {"domain": "near"},
        result(7.0, 2, None) | {"domain": "far"},
    ]  # fmt: skip
    found = summary(sets)
    near = found["domains"]["near"]
    assert near["nats_per_token"] == pytest.approx(130 / 60) and near["num_text_bytes"] == 150
    assert near["bits_per_byte"] == pytest.approx(130 / math.log(2) / 150)
    assert near["nats_per_token_standard_error"] == pytest.approx(math.hypot(50 * 0.2, 10 * 0.1) / 60)
    assert found["overall"]["num_tokens"] == 62 and found["overall"]["bits_per_byte"] is None
    assert list(found["domains"]) == ["near", "far"]


def finished(path, models) -> Results:
    results = Results.begin(HEADER, models)
    for entry, numbers in results.waiting():
        for number in numbers:
            results.finish_set(entry, number, result(10.0 + number, 5, 20))
    results.write(path)
    return results


def test_results_are_gone_on_from_set_by_set_and_inside_a_set(tmp_path):
    path = tmp_path / "results.json"
    results = Results.begin(HEADER, [model(5)])
    ((entry, numbers),) = results.waiting()
    assert numbers == [0, 1] and Results.progress(entry["sets"][0]) == (Sums(), (0, 0))
    results.finish_set(entry, 0, result(10.0, 5, 20))
    results.keep_progress(entry, 1, Sums(nats=0.1 + 0.2, num_tokens=3), (7, 2))
    results.write(path)
    wanted = Results.begin(copy.deepcopy(HEADER), [model(5) | {"folder": "elsewhere"}])
    again = taken_up(wanted, path, overwrite=False, keeps_others=False)
    ((entry, numbers),) = again.waiting()
    assert numbers == [1] and entry["folder"] == "elsewhere"
    assert Results.progress(entry["sets"][1]) == (Sums(nats=0.1 + 0.2, num_tokens=3), (7, 2))
    again.finish_set(entry, 1, result(10.0, 5, 20))
    assert again.is_complete and "progress" not in entry["sets"][1] and entry["overall"]["num_sets"] == 2
    assert taken_up(wanted, path, overwrite=True, keeps_others=False) is wanted
    assert "step 5, 50 tokens trained" in table(again.tree)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_costs_its_own_set_and_no_other(lost, tmp_path):
    """The file and what is printed are JSON as it is defined: without NaN and infinities."""
    path = tmp_path / "curve.json"

    def strict(text: str) -> dict:
        return json.loads(text, parse_constant=pytest.fail)

    results = Results.begin(HEADER | {"sets": [*HEADER["sets"], {"name": "c", "domain": "far", "files": []}]},
                            [model(5), model(7)])  # fmt: skip
    diverged, sound = results.tree["models"]
    sums = Sums()
    sums.add([window(0, 3, True), window(1, 2, False)], [lost, 1.0])
    results.keep_progress(diverged, 1, sums, (1, 1))
    results.write(path)
    strict(path.read_text())
    again = read_results(path)
    diverged, sound = again.tree["models"]
    sums, place = Results.progress(diverged["sets"][1])  # gone on from in the middle of the set
    assert place == (1, 1) and (sums.num_tokens, sums.num_units, sums.open_tokens) == (5, 1, 2)
    sums.add([window(1, 4, True)], [2.0])
    assert sums.num_units == 2 and sums.standard_error is None
    again.finish_set(diverged, 1, set_result(sums, num_documents=2, num_text_bytes=9))
    for entry, numbers in again.waiting():
        for number in numbers:
            again.finish_set(entry, number, result(10.0, 5, 20))
    again.write(path)
    assert strict(shown(again.tree, as_json=True)) == strict(path.read_text()) == again.tree and again.is_complete
    figures = (
        "nats_per_token", "nats_per_token_standard_error", "perplexity", "perplexity_standard_error", "bits_per_byte"
    )  # fmt: skip
    for found in (diverged["sets"][1], diverged["domains"]["far"], diverged["overall"]):
        assert [found[key] for key in figures] == [None] * 5
    assert diverged["sets"][1]["nats"] is None and diverged["sets"][1]["num_tokens"] == 9
    for found in (*diverged["sets"][::2], diverged["domains"]["near"], sound["domains"]["far"], sound["overall"]):
        assert None not in [found[key] for key in figures]
    first, second = table(again.tree).split("\n\n")
    assert [line.split()[0] for line in first.splitlines() if "not finite" in line] == ["b", "all", "all"]
    assert "not finite" not in second
    # For a study the whole domain is unknown: the mean of what is left of it would be of other texts.
    assert list(_scores(diverged)) == ["a"] and list(_scores(sound)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sets": [HEADER["sets"][0], {"name": "b", "domain": "far", "files": ["3"]}]},
            'the sets differ ([1].files[0] "2" there, "3" here)',
        ),
        ({"layout": {"num_ranks": 4, "micro_batch_size": 1}}, "the layout differs (num_ranks 2 there, 4 here)"),
        ({"precision": "bf16"}, 'the precision differs (it "fp32" there, "bf16" here)'),
        (
            {"capacity": {"drops_tokens": True, "kind": "factor", "value": 2.0}},
            "the capacity of experts differs (drops_tokens false there, true here)",
        ),
    ],
)
def test_results_of_something_else_are_refused(change, message, tmp_path):
    path = tmp_path / "results.json"
    before = finished(path, [model(5)])
    with pytest.raises(ConfigError) as caught:
        taken_up(Results.begin(HEADER | change, [model(5)]), path, overwrite=False, keeps_others=True)
    assert str(caught.value) == (
        f"{path} holds results of another evaluation: {message}: add --overwrite to start anew, or choose another --out"
    )
    assert read_results(path).tree == before.tree


def test_a_curve_takes_up_new_checkpoints_and_keeps_old_ones(tmp_path):
    path = tmp_path / "curve.json"
    finished(path, [model(5), model(10)])
    with pytest.raises(ConfigError, match=r"holds results of another model, .*step_00000005 at step 5"):
        taken_up(Results.begin(HEADER, [model(10)]), path, overwrite=False, keeps_others=False)
    again = taken_up(Results.begin(HEADER, [model(10), model(7)]), path, overwrite=False, keeps_others=True)
    assert [entry["step"] for entry in again.tree["models"]] == [5, 7, 10]
    assert [entry["step"] for entry, _ in again.waiting()] == [7] and not again.is_complete


def test_what_was_begun_of_a_checkpoint_that_is_another_now_is_begun_anew(tmp_path):
    """Its folder has the same name, and its sums are of other weights."""
    path = tmp_path / "results.json"
    old = Results.begin(HEADER, [model(10, "old")])
    old.keep_progress(old.tree["models"][0], 0, Sums(nats=5.0, num_tokens=3), (1, 0))
    old.write(path)
    again = taken_up(Results.begin(HEADER, [model(10, "new")]), path, overwrite=False, keeps_others=True)
    assert [entry["manifest_checksum"] for entry, _ in again.waiting()] == ["new10"]
    assert Results.progress(again.tree["models"][0]["sets"][0])[0].num_tokens == 0


def of_run(run, step: int, checksum: str = "c") -> dict:
    """As of a run in the folder `run`, which is there."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    return model(step, checksum) | {"checkpoint": str(run / "checkpoints" / f"step_{step:08d}")}


def test_a_curve_is_of_one_run(tmp_path):
    path = tmp_path / "curve.json"
    before = finished(path, [of_run(tmp_path / "one", 5), of_run(tmp_path / "one", 10)])
    other = Results.begin(HEADER, [of_run(tmp_path / "other", 5, "d"), of_run(tmp_path / "other", 10, "d")])
    with pytest.raises(ConfigError) as caught:
        taken_up(other, path, overwrite=False, keeps_others=True)
    assert str(caught.value) == (
        f"{path} holds results of another model, {tmp_path}/one/checkpoints/step_00000005 at step 5: add --overwrite "
        "to start anew, or choose another --out"
    )
    # A copy of the run that was trained on is another one, too, though both have a checkpoint in common.
    copied = Results.begin(HEADER, [of_run(tmp_path / "copy", 5), of_run(tmp_path / "copy", 15, "d")])
    with pytest.raises(ConfigError, match="at step 10: add --overwrite"):
        taken_up(copied, path, overwrite=False, keeps_others=True)
    assert read_results(path).tree == before.tree


def test_a_run_that_was_moved_or_is_named_otherwise_keeps_its_curve(tmp_path, monkeypatch):
    path, run = tmp_path / "curve.json", tmp_path / "runs" / "one"
    finished(path, [of_run(run, 5), of_run(run, 10)])
    monkeypatch.chdir(tmp_path / "runs")
    relative = Path("../runs/one/checkpoints/step_00000015")
    wanted = Results.begin(HEADER, [model(15) | {"checkpoint": str(relative)}])
    found = taken_up(wanted, path, overwrite=False, keeps_others=True)
    assert [entry["step"] for entry in found.tree["models"]] == [5, 10, 15] and found.notes == []
    run.rename(tmp_path / "runs" / "moved")
    moved = [of_run(tmp_path / "runs" / "moved", step) for step in (10, 15)]
    found = taken_up(Results.begin(HEADER, moved), path, overwrite=False, keeps_others=True)
    assert [entry["checkpoint"] for entry in found.tree["models"]] == [
        str(tmp_path / "runs" / "moved" / "checkpoints" / f"step_{step:08d}") for step in (5, 10, 15)
    ]
    assert [entry["step"] for entry, _ in found.waiting()] == [15]


def test_results_of_a_step_that_was_saved_anew_are_left_out_with_those_after_it(tmp_path):
    path, run = tmp_path / "curve.json", tmp_path / "run"
    finished(path, [of_run(run, step, "old") for step in (5, 10, 15)])
    wanted = Results.begin(HEADER, [of_run(run, 10, "new"), of_run(run, 20, "new")])
    found = taken_up(wanted, path, overwrite=False, keeps_others=True)
    assert [entry["manifest_checksum"] for entry in found.tree["models"]] == ["old5", "new10", "new20"]
    assert found.notes == [
        f"{path} held results of steps 10, 15 from before the run saved step 10 anew: they are left out, for their "
        "weights are not the run's any more"
    ]
    assert "notes" not in found.tree


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree.pop("models"),
        lambda tree: tree["models"][0].pop("manifest_checksum"),
        lambda tree: tree["models"][0].update(step="5"),
        lambda tree: tree["models"][0]["sets"].pop(),
        lambda tree: tree["models"][0]["sets"][0].pop("num_computed_tokens"),
        lambda tree: tree["models"][0]["sets"][1]["progress"].pop("next_unit"),
        lambda tree: tree["models"][0]["sets"][1]["progress"]["sums"].pop("nats"),
        lambda tree: tree["models"][0]["sets"][1]["progress"]["sums"].pop("num_tokens"),
        lambda tree: tree["models"][0]["sets"][1]["progress"].update(sums=[]),
        lambda tree: tree.update(models=[1]),
        lambda tree: tree.pop("layout"),
    ],
)
def test_a_file_that_is_damaged_is_answered_in_one_sentence(spoil, tmp_path):
    path = tmp_path / "results.json"
    results = Results.begin(HEADER, [model(5)])
    results.finish_set(results.tree["models"][0], 0, result(10.0, 5, 20))
    results.keep_progress(results.tree["models"][0], 1, Sums(nats=1.0, num_tokens=3), (7, 2))
    results.write(path)
    assert read_results(path).tree == results.tree
    spoil(results.tree)
    path.write_text(json.dumps(results.tree))
    with pytest.raises(OutputError) as caught:
        read_results(path)
    assert str(caught.value) == (
        f"{path} is damaged: not all that results of an evaluation hold is there: choose another --out, or add "
        "--overwrite to start anew"
    )


@pytest.mark.parametrize("content", ["{}", "[1", '{"format": "megamoe-evaluation", "version": 9}'])
def test_another_file_is_not_overwritten(content, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(OutputError, match="choose another --out"):
        read_results(path)
    assert path.read_text() == content and read_results(tmp_path / "none.json") is None


def test_capacities_are_settings_and_words():
    moe, dense = config_with("moe.num_experts=4"), config_with("moe.num_experts=0")
    assert Capacity().overrides() == () and Capacity().describe(dense)["drops_tokens"] is False
    chosen = Capacity(factor=1.5)
    assert chosen.overrides() == ("moe.eval_capacity_factor=1.5", "moe.eval_capacity_fraction=null")
    assert chosen.describe(moe) == {"drops_tokens": True, "kind": "factor", "value": 1.5}
    assert Capacity(as_trained=True).describe(moe) == {"drops_tokens": True, "kind": "as_trained", "value": 1.0}
    assert Capacity(as_trained=True).describe(config_with("moe.num_experts=4", "moe.dropless=true")) == {
        "drops_tokens": False, "why": "as trained: dropless"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="a capacity is of experts, and this model has none: leave it out"):
        chosen.describe(dense)
    with pytest.raises(ConfigError, match="trained dropless"):
        chosen.describe(config_with("moe.num_experts=4", "moe.dropless=true"))


def test_steps_that_a_run_has_not_kept_are_named(tmp_path):
    for step in (5, 20, 100):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert [each.name for each in checkpoints_of_run(tmp_path, None)] == [
        "step_00000005", "step_00000020", "step_00000100"
    ]  # fmt: skip
    assert [each.name for each in checkpoints_of_run(tmp_path, [100, 5])] == ["step_00000005", "step_00000100"]
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 7: it has those of steps 5, 20, 100"):
        checkpoints_of_run(tmp_path, [5, 7])
    with pytest.raises(ConfigError, match="is no run's folder with checkpoints"):
        checkpoints_of_run(tmp_path / "checkpoints" / "step_00000005", None)
