"""What a study's file may say, what is refused and in which words, and what a study will cost."""

import contextlib
import errno
import json
import os
import time

import pytest
import yaml

from megamoe.cli import main
from megamoe.config.loading import dump_yaml
from megamoe.errors import ConfigError
from megamoe.study import forecast as forecast_module
from megamoe.study.ladder import differing_keys, study_runs
from megamoe.study.lock import study_lock
from megamoe.study.schema import read_study
from megamoe.study.states import Cost
from tests.fork_server import ROOT
from tests.unit.study_cases import TINY_STUDY, load_tiny

MODELS = yaml.safe_load(TINY_STUDY)["models"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(TINY_STUDY)
    return tmp_path


def changed(**changes) -> str:
    return yaml.safe_dump(yaml.safe_load(TINY_STUDY) | changes)


def with_model(place: int, **changes) -> str:
    models = [dict(model) for model in MODELS]
    models[place] |= changes
    return changed(models=models)


REFUSED = [
    (changed(sead=[1]), 'unknown key "sead" in study.yaml: did you mean "seeds"?'),
    (changed(seeds=[]), "seeds is [] in study.yaml: it must be a list, each a whole number of at least 0"),
    (changed(num_tokens="many"), 'num_tokens is "many" in study.yaml: it must be a whole number of at least 1'),
    (changed(num_tokens=1000), "num_tokens is 1000 in study.yaml: it must be whole steps of 128 tokens, as 1024 is"),
    (changed(evaluate_at_tokens=[512, 600]),
     "evaluate_at_tokens[1] is 600 in study.yaml: it must be whole steps of 128 tokens, as 640 is"),
    (changed(evaluate_at_tokens=[2048]), "evaluate_at_tokens[0] is 2048 in study.yaml: training ends at 1024"),
    (changed(common={"preset": "laptop-dens"}),
     'no preset "laptop-dens" in common of study.yaml: did you mean "laptop-dense"?'),
    (changed(common={"run": {"num_steps": 10}}),
     "run.num_steps is set in common of study.yaml: it follows from the study, leave it out"),
    (changed(common=3), "common is 3 in study.yaml: it must be a group of settings"),
    (changed(analysis={"baseline": "dance"}),
     'analysis.baseline is "dance" in study.yaml, but no model is of that family: the families are dense, moe'),
    (changed(analysis={"compared": "dense"}),
     'analysis.compared is "dense" in study.yaml, as baseline is: name another family'),
    (changed(dir=""), 'dir is "" in study.yaml: name a folder of the study\'s own, as runs/study is'),
    (changed(name=".."), 'name is ".." in study.yaml: name a folder of the study\'s own, as runs/study is'),
    (changed(may_differ=["model.hiden"]),
     'may_differ names "model.hiden", which is no key of a configuration: write one as model.init_std'),
    (with_model(1, name="dense-0"), 'two models of study.yaml are named "dense-0": give each a name of its own'),
    (with_model(1, seeds=[1, 1]), "models[1].seeds is [1, 1] in study.yaml: name each seed once"),
    (with_model(1, settings={"model": {"hiden_size": 8}}),
     'unknown key "model.hiden_size" in models[1].settings of study.yaml: did you mean "model.hidden_size"?'),
    (with_model(1, settings={"preset": "laptop-moe"}),
     "preset is set in models[1].settings of study.yaml: put it into common, for models differ in a few keys alone"),
    (with_model(2, settings={"optimizer": {"beta2": 0.9}}),
     "optimizer.beta2 is 0.98 for dense-0 and 0.9 for dense-1: models of a study are trained under equal rules; set it "
     "in common, or list it in may_differ"),
    (with_model(2, settings={"run": {"global_batch_size": 8}}),
     "run.global_batch_size is 4 for dense-0 and 8 for dense-1: models of a study are trained under equal rules; set "
     "it in common, or list it in may_differ"),
    (with_model(2, settings={"model": {"hidden_size": 15}}),
     "model dense-1 of study.yaml: num_attention_heads 2 does not divide hidden_size 15: use 1, 3, 5, 15"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_what_is_refused(place, capsys, text, message):
    (place / "study.yaml").write_text(text)
    assert main(["study", "study.yaml", "--plan"]) == 2
    assert capsys.readouterr().err == f"megamoe: error: {message}\n"
    assert sorted(os.listdir(place)) == ["study.yaml"], "nothing is begun"


def test_runs_differ_in_what_the_study_says_and_in_nothing_else(place):
    study, runs = load_tiny(place)
    assert [run.name for run in runs] == [
        "dense-0-seed1", "dense-0-seed2", "moe-0-seed1", "dense-1-seed1", "moe-1-seed1"
    ]  # fmt: skip
    for run in runs:
        assert run.dir == study.folder / run.name and run.eval_steps == (4, 8)
        assert run.config.run.num_steps == 8 and run.config.checkpoint.keep_every_steps == 4
        assert run.config.checkpoint.on_save_failure == "stop", "a checkpoint that is not saved cannot be evaluated"
    first, other, mixture, wide, _ = (run.config for run in runs)
    assert differing_keys(first, other) == ["run.dir", "run.seed"]
    assert differing_keys(first, mixture) == ["moe.num_experts", "run.dir"]
    assert differing_keys(first, wide) == ["model.hidden_size", "run.dir"]


def test_may_differ_lets_more_differ(place):
    text = with_model(2, settings={"optimizer": {"beta2": 0.9}})
    (place / "study.yaml").write_text(text.replace("may_differ: []", "may_differ: [optimizer.beta2]"))
    assert load_tiny(place)[1][3].config.optimizer.beta2 == 0.9


def test_a_folder_of_another_study_is_refused(place, capsys):
    study, runs = load_tiny(place)
    runs[2].dir.mkdir(parents=True)
    other = runs[2].config.model_copy(update={"optimizer": runs[2].config.optimizer.model_copy(update={"lr": 0.5})})
    (runs[2].dir / "config.yaml").write_text(dump_yaml(other))
    assert main(["study", "study.yaml"]) == 2
    assert capsys.readouterr().err == (
        "megamoe: error: runs/tiny/moe-0-seed1 was trained with optimizer.lr 0.5, and the study says 0.02: choose "
        "another --out, or remove that folder\n"
    )
    assert not (study.folder / "dense-0-seed1").exists()


def test_a_model_that_is_not_there_cannot_be_chosen(place, capsys):
    assert main(["study", "study.yaml", "--only", "dense-3"]) == 2
    assert capsys.readouterr().err == (
        'megamoe: error: --only names "dense-3": the models are dense-0, moe-0, dense-1, moe-1\n'
    )


def test_the_plan_adds_up(place, capsys):
    """By the formulas, and by the plan of `megamoe plan` for the same steps."""
    assert main(["study", "study.yaml", "--plan", "--cluster", "a100-80gb", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    _, runs = load_tiny(place)
    seeds = {"dense-0": 2}
    for model in told["models"]:
        run = next(run for run in runs if run.model.name == model["model"])
        assert model["num_seeds"] == seeds.get(model["model"], 1)
        assert model["paper_flops"] == run.paper_flops(1024, None) and model["model_flops"] == run.model_flops(1024)
        assert model["disk_bytes"] == model["num_seeds"] * 2 * 12 * run.num_parameters
        (place / "one.yaml").write_text(dump_yaml(run.config))
        main(["plan", "one.yaml", "--cluster", "a100-80gb", "--json"])
        step = json.loads(capsys.readouterr().out)["step"]
        assert model["seconds"] == pytest.approx(8 * step["seconds"]) and not model["is_measured"]
    for key in ("paper_flops", "model_flops", "seconds"):
        total = sum(model[key] * model["num_seeds"] for model in told["models"])
        assert told["total"][key] == pytest.approx(total)
    assert main(["study", "study.yaml", "--plan"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny: 4 models, 5 runs of 1,024 tokens in batches of 4 x 32\n")
    assert "time of training" not in text, "of no cluster no time is told"
    assert sorted(os.listdir(place)) == ["one.yaml", "study.yaml"]


def test_a_plan_says_which_model_does_not_fit(place, capsys):
    large = {"model": {"num_layers": 48, "hidden_size": 8192, "num_attention_heads": 64, "seq_length": 2048}}
    tree = yaml.safe_load(changed())
    tree["models"][0]["settings"], tree["may_differ"], tree["num_tokens"] = large, ["model.seq_length"], 32768
    tree["evaluate_at_tokens"] = None
    (place / "study.yaml").write_text(yaml.safe_dump(tree))
    assert main(["study", "study.yaml", "--plan", "--cluster", "a100-40gb"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "DOES NOT FIT" in line]
    assert len(lines) == 1 and lines[0].startswith("dense-0 DOES NOT FIT: "), lines
    tree["models"][0]["settings"] |= {"run": {"precision": "fp16"}}
    tree["may_differ"].append("run.precision")
    (place / "study.yaml").write_text(yaml.safe_dump(tree))
    assert main(["study", "study.yaml", "--plan", "--cluster", "cpu", "--gpus", "3"]) == 2
    assert capsys.readouterr().err.startswith("megamoe: error: model dense-0: ")


def test_what_is_trained_needs_no_cluster_for_its_time(place, capsys, monkeypatch):
    monkeypatch.setattr(forecast_module, "is_trained", lambda run: True)
    monkeypatch.setattr(forecast_module, "costs_of", lambda run, steps: {steps[0]: Cost(30.0, None)})
    assert main(["study", "study.yaml", "--plan"]) == 0
    assert "time of training steps as measured: 2 min (* measured); starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--submit", "--nodes '4"], "--submit is \"--nodes '4\": No closing quotation; write options as in a shell"),
        (["--gpus", "8"], "--cluster, --gpus and --json go with --plan"),
        (["--report-only", "--only", "moe-0"],
         "--only says what is trained: it goes with none of --plan, --report-only, --no-train"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(place, capsys, monkeypatch, words, told):
    monkeypatch.setattr("megamoe.study.scoring.check_evaluation", lambda *_, **__: None)
    with contextlib.suppress(SystemExit):
        assert main(["study", "study.yaml", *words]) == 2
    assert capsys.readouterr().err.endswith(f"error: {told}\n")


def test_a_study_becomes_an_array_of_jobs(place, capfd):
    for name in ("train.bin", "train.idx"):
        (place / name).touch()
    missing = main(["study", "study.yaml", "--submit=--dry-run"])
    assert missing == 2 and "sets.yaml" in capfd.readouterr().err, "found before days of training, not after"
    (place / "sets.yaml").write_text("sets: [{name: docs, path: docs.txt, domain: in_domain}]\n")
    (place / "docs.txt").write_text("one line of more than 32 letters, which is one block\n")
    words = "--nodes 1 --ranks-per-node 1 --no-preflight --dry-run"
    assert main(["study", "study.yaml", "--only", "moe-0", "--only", "moe-1", "--submit", words]) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-1" in script and "runs/tiny/moe-1-seed1" in script
    assert "dense-0" not in script and "#SBATCH --ntasks-per-node=1" in script


def test_a_checkpoint_at_nearly_every_step_is_refused(place):
    tree = yaml.safe_load(TINY_STUDY)
    batch = tree["common"]["run"]["global_batch_size"] * tree["common"]["model"]["seq_length"]
    tree |= {"num_tokens": 4096 * batch, "evaluate_at_tokens": [2048 * batch, 3073 * batch]}
    (place / "study.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as refused:
        load_tiny(place)
    assert str(refused.value) == (
        f"evaluate_at_tokens and num_tokens of study.yaml have no larger measure than {batch} tokens: each run would "
        f"keep 4096 checkpoints; use multiples of {64 * batch}"
    )
    tree["evaluate_at_tokens"] = [2048 * batch, 3072 * batch]
    (place / "study.yaml").write_text(yaml.safe_dump(tree))
    assert load_tiny(place)[1][0].eval_steps == (2048, 3072, 4096)


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with study_lock(tmp_path), pytest.raises(ConfigError) as refused, study_lock(tmp_path, wait_seconds=0.3):
        pass
    assert str(refused.value) == f"another process works on the study in {tmp_path}: wait for it, or end it first"
    with study_lock(tmp_path, wait_seconds=0.3):
        pass


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unsupported)
    told = r"cannot be locked \(Function not implemented\), so that two commands "
    with pytest.raises(ConfigError, match=told), study_lock(tmp_path):
        pass


def test_the_shipped_study_is_sound(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(ROOT / "launch_scripts/studies/laptop.yaml")
    runs = study_runs(study, "laptop.yaml")
    sizes = {family: {run.model.name for run in runs if run.model.family == family} for family in ("dense", "moe")}
    assert len(sizes["dense"]) >= 3 and len(sizes["moe"]) >= 3
    assert sum(run.model.name == study.models[0].name for run in runs) >= 3
    assert {run.config.moe.num_experts for run in runs if run.model.family == "moe"} == {16, 64}
    assert all(run.eval_steps == (2048, 3072, 4096) for run in runs)


def test_help_is_quick(capsys):
    started = time.monotonic()
    with pytest.raises(SystemExit) as left:
        main(["study", "--help"])
    assert left.value.code == 0 and time.monotonic() - started < 1.0
    assert "--report-only" in capsys.readouterr().out
