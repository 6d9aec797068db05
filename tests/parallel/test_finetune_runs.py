"""Fine-tuning as whole runs: tasks are learned, the best checkpoint is kept, a run that was killed is the unbroken one,
what is frozen stays to the bit."""

import json
import shlex
from pathlib import Path

import pytest

from megamoe import convert_commands
from megamoe.checkpoint.reader import Checkpoint
from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError
from megamoe.train_start import _completed_steps
from tests.harness import RanksFailed
from tests.parallel.finetune_cases import (
    MODEL,
    MOE,
    changed_tensors,
    checkpoints,
    finetuned,
    results,
    task,
    train,
    validations,
    write_tasks,
)

CLASSIFY = ("finetune.objective=classification", "finetune.num_epochs=4")
DROPOUT = ("model.hidden_dropout=0.1", "moe.input_jitter=0.05")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def files(root) -> dict[str, Path]:
    return write_tasks(root)


@pytest.fixture(scope="module")
def bases(root, files) -> dict[str, Config]:
    """Language models to begin from, an MoE with selection biases and a dense one, trained for a step."""
    (root / "base.yaml").write_text("{}\n")
    more = (*MODEL, *task(files, "prompts"), "finetune.objective=language_model", "run.num_steps=1")
    bias = ("moe.score_function=sigmoid", "moe.balance_bias_update_rate=0.01")
    found = {
        name: load_config(str(root / "base.yaml"), [*more, *kind, f"run.dir={root / name}"])
        for name, kind in (("moe", (*MOE, *bias)), ("dense", ()))
    }
    train(1, *found.values())
    return found


@pytest.fixture(scope="module")
def learned(root, files, bases) -> dict[str, Config]:
    """Five runs on one rank."""
    moe, dense = Path(bases["moe"].run.dir), Path(bases["dense"].run.dir)
    completes = (*task(files, "prompts"), "finetune.num_epochs=12", "optimizer.schedule=constant")
    found = {
        "moe": finetuned(moe, root / "moe_texts", *task(files, "texts"), *CLASSIFY, "finetune.best_by=accuracy"),
        "dense": finetuned(dense, root / "dense_texts", *task(files, "texts"), *CLASSIFY),
        "completes": finetuned(moe, root / "moe_prompts", *completes, "finetune.freeze=[routers,experts]"),
        # A rate at which the loss goes up again.
        "stops": finetuned(
            moe, root / "stops", *task(files, "texts"), *CLASSIFY, "optimizer.lr=0.3", "finetune.num_epochs=30",
            "run.eval_interval_steps=2", "checkpoint.keep_last=1", "finetune.stop_after_validations=4",
            "optimizer.warmup_steps=0", "optimizer.schedule=constant", "guard.action=disabled",
        ),
    }  # fmt: skip
    train(1, *found.values())
    return found


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_a_separable_task_is_classified_without_a_mistake(learned, name):
    config = learned[name]
    assert config.finetune.labels == ("early", "late") and config.model.num_labels == 2  # found in the file
    assert config.run.num_steps == 24 and config.optimizer.warmup_steps == 2
    lines = validations(config)
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert lines[-1]["valid_accuracy"] == 1.0 and lines[-1]["valid_loss"] < 0.1


def test_completions_are_learned_with_routers_and_experts_frozen(learned, bases):
    """Four letters of each completion follow from the prompt, and the end from them: next to nothing is left."""
    config, base = learned["completes"], Path(bases["moe"].run.dir) / "checkpoints" / "step_00000001"
    lines = validations(config)
    assert lines[-1]["valid_loss"] < 0.05 < 1.0 < lines[0]["valid_loss"]
    assert "valid_accuracy" not in lines[-1]
    last = Path(config.run.dir) / "checkpoints" / checkpoints(config)[-1]
    changed = changed_tensors(base, last)
    with Checkpoint.open(last) as checkpoint:
        tensors = checkpoint.manifest.tensors
    weights = {name for kind, name in tensors if kind == "weight"}
    frozen = {name for name in weights if ".router." in name or ".experts." in name}
    assert changed == weights - frozen and frozen
    assert {name for kind, name in tensors if kind == "exp_avg"} == weights - frozen
    # The selection bias is a part of the router: in the selection still, and as it was.
    assert any(kind == "balance_bias" for kind, _ in tensors)
    assert changed_tensors(base, last, "balance_bias") == set()


def test_the_best_checkpoint_is_that_of_the_best_validation_and_survives(learned):
    config = learned["stops"]
    lines, found, kept = validations(config), results(config), checkpoints(config)
    best = min(lines, key=lambda line: line["valid_loss"])
    assert found["best_step"] == best["step"] and found["valid_loss"] == best["valid_loss"]
    assert kept == [f"step_{best['step']:08d}", f"step_{lines[-1]['step']:08d}"]  # the last one and the best
    assert found["best_checkpoint"] == f"checkpoints/step_{best['step']:08d}"
    assert found["stopped_early"] and lines[-1]["step"] == best["step"] + 4 * 2 < config.run.num_steps
    events = (Path(config.run.dir) / "events.jsonl").read_text().splitlines()
    (event,) = (event for event in map(json.loads, events) if event["kind"] == "best")
    assert event["step"] == best["step"] and f"{config.run.dir}/{found['best_checkpoint']}" in event["message"]
    # The same command finds nothing left to do.
    assert _completed_steps(config) == (lines[-1]["step"], True)


def test_the_command_that_is_told_at_the_end_exports_the_best_checkpoint_not_the_newest(learned, capsys, monkeypatch):
    run = learned["stops"].run.dir
    events = map(json.loads, (Path(run) / "events.jsonl").read_text().splitlines())
    (message,) = (event["message"] for event in events if event["kind"] == "best")
    words = shlex.split(message.split("`")[1])
    assert words == ["megamoe", "convert", "to-hf", run, f"{run}_hf", "--best"]
    best, newest = (Path(run) / "checkpoints" / name for name in checkpoints(learned["stops"]))
    assert main([*words[1:], "--no-verify"]) == 0
    assert f"megamoe: best checkpoint: {best}\n" in capsys.readouterr().err
    assert json.loads(Path(f"{run}_hf/conversion.json").read_text())["source"]["folder"] == str(best)
    taken = []
    monkeypatch.setattr(convert_commands, "_compare", lambda checkpoint, *_, **__: taken.append(checkpoint))
    for options in (["--best"], []):
        assert main(["convert", "verify", run, f"{run}_hf", "--json", *options]) == 0
    assert taken == [best, newest]
    capsys.readouterr()
    for folder in (run + "_hf", str(best)):
        assert main(["convert", "to-hf", folder, f"{run}_none", "--best"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"megamoe: error: no {folder}/finetune.json names a best") and error.count("\n") == 1


def test_best_by_accuracy_is_the_first_of_the_highest(learned):
    lines = validations(learned["moe"])
    highest = max(line["valid_accuracy"] for line in lines)
    first = next(line for line in lines if line["valid_accuracy"] == highest)
    assert results(learned["moe"])["best_step"] == first["step"]
    assert f"step_{first['step']:08d}" in checkpoints(learned["moe"])


def test_a_killed_run_is_the_unbroken_one_to_the_bit(root, files, bases):
    """Two expert ranks, dropout, jitter, 16 bits with norms and experts frozen, which have no masters; killed between a
    validation and a save."""
    start = Path(bases["moe"].run.dir)
    settings = (
        *task(files, "texts"), *CLASSIFY, *DROPOUT, "parallel.expert_parallel_size=2", "run.num_steps=16",
        "finetune.num_epochs=null", "checkpoint.save_interval_steps=4", "run.eval_interval_steps=2",
        "checkpoint.keep_last=2", "finetune.freeze=[norms,experts]",
        "run.precision=bf16",
    )  # fmt: skip
    unbroken, cut = (finetuned(start, root / name, *settings) for name in ("unbroken", "cut"))
    train(2, unbroken)
    with pytest.raises(RanksFailed) as caught:
        train(2, cut, kill=(1, 11))
    assert caught.value.failure.kind == "killed"
    assert _completed_steps(cut)[0] in (8, 10)
    train(2, cut)
    assert validations(cut) == validations(unbroken)
    assert results(cut) == results(unbroken)
    assert checkpoints(cut) == checkpoints(unbroken)
    names = [Path("checkpoints") / name for name in checkpoints(cut)]
    for name in names:
        assert changed_tensors(root / "cut" / name, root / "unbroken" / name, kind="") == set()
    # Another layout reads it, rewritten or as it is.
    for name, layout in (("as it is", ()), ("resharded", ("parallel.expert_parallel_size=1", "parallel.zero_stage=2"))):
        source = root / "cut" / names[-1]
        if layout:
            assert main(["checkpoint", "reshard", str(source), str(root / "resharded"), "--ranks", "2", *layout]) == 0
            source = root / "resharded"
        assert changed_tensors(source, root / "unbroken" / names[-1]) == set(), name
    longer = finetuned(start, root / "cut", *settings, *layout, "run.num_steps=18")
    train(1, longer)
    assert validations(longer)[-1]["step"] == 18
    moved = changed_tensors(root / "unbroken" / names[-1], root / "cut" / "checkpoints" / "step_00000018")
    assert "score.weight" in moved and not any("norm." in name or ".experts." in name for name in moved)
    # Other frozen parts, or another task, are another training.
    other = finetuned(start, root / "cut", *settings, "finetune.freeze=[routers]")
    with pytest.raises(CheckpointError, match=r"another training \(finetune.freeze \['norms', 'experts'\] there, \['r"):
        _completed_steps(other)


def test_a_classifier_goes_on_as_a_classifier_and_another_head_is_refused(root, files, learned):
    start = Path(learned["moe"].run.dir)
    again = finetuned(start, root / "again", *task(files, "texts"), "run.num_steps=1", "optimizer.lr=0")
    assert again.finetune.labels == ("early", "late") and again.model.num_labels == 2
    train(1, again)
    assert validations(again)[-1]["valid_accuracy"] == 1.0  # the head came along
    three = ("model.num_labels=3", "finetune.labels=[early,late,never]")
    with pytest.raises(CheckpointError, match=r"holds another model \(model.num_labels 2 there, 3 here\)"):
        finetuned(start, root / "three", *task(files, "texts"), *three)
    # Ranks that are given such a configuration find it, too.
    changed = again.model_copy(update={
        "model": again.model.model_copy(update={"num_labels": 3}),
        "finetune": again.finetune.model_copy(update={"labels": ("early", "late", "never")}),
        "run": again.run.model_copy(update={"dir": str(root / "three")}),
    })  # fmt: skip
    with pytest.raises(RanksFailed) as caught:
        train(1, changed)
    assert "holds another model (model.num_labels 2 there, 3 here)" in caught.value.failure.message
