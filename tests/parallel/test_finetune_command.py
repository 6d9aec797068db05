"""`megamoe finetune`: what it finds out by itself, where weights may come from, and one sentence for each mistake."""

import re
import shutil
from pathlib import Path

import pytest

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.convert.export_files import export_files, tokenizer_files
from megamoe.convert.hf_tables import conversion, to_hf_config
from megamoe.convert.to_hf import export
from megamoe.errors import ConfigError
from megamoe.runs.run_folder import resumable_checkpoints
from tests.parallel.finetune_cases import (
    MODEL,
    MOE,
    changed_tensors,
    finetuned,
    results,
    task,
    train,
    validations,
    write_lines,
    write_tasks,
)

QUIET = ("monitor.wandb_mode=disabled", "run.micro_batch_size=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def files(root) -> dict[str, Path]:
    return write_tasks(root)


@pytest.fixture(scope="module")
def base(root, files) -> Config:
    (root / "base.yaml").write_text("{}\n")
    settings = (*MODEL, *MOE, *task(files, "prompts"), "finetune.objective=language_model", "run.num_steps=1")
    config = load_config(str(root / "base.yaml"), [*settings, f"run.dir={root / 'base'}", "run.seed=3"])
    train(1, config)
    return config


@pytest.fixture(scope="module")
def hf_folder(root, base) -> Path:
    out, (checkpoint, *_) = root / "hf", resumable_checkpoints(base.run.dir)
    with Checkpoint.open(checkpoint) as opened:
        config, manifest = config_of(opened), opened.manifest
    theirs = to_hf_config(config, dtype="float32")
    table = conversion(config, theirs)
    made = export_files(theirs, table, manifest, tokenizer_files(config), name="base", dtype="float32")
    export(checkpoint, out, table, dtype="fp32", files=made, workers=0)
    return out


def test_what_is_not_said_follows_from_weights_and_files(root, base, files):
    found = finetuned(Path(base.run.dir), root / "new", *task(files, "texts"), "finetune.objective=classification")
    assert found.model.num_labels == 2 and found.finetune.labels == ("early", "late")
    assert found.model.model_copy(update={"num_labels": 0}) == base.model and found.moe == base.moe
    # 96 examples in batches of 16, three epochs: 18 steps, and a sixth of that for one epoch.
    assert (found.run.num_steps, found.finetune.num_epochs) == (18, 3.0)
    assert (found.run.eval_interval_steps, found.checkpoint.save_interval_steps) == (6, 6)
    assert (found.optimizer.warmup_steps, found.optimizer.schedule, found.optimizer.clip_grad) == (2, "linear", 1.0)
    assert found.checkpoint.load_from == str(resumable_checkpoints(base.run.dir)[0])
    steps = finetuned(Path(base.run.dir), root / "new", *task(files, "prompts"), "run.num_steps=7")
    assert (steps.run.num_steps, steps.finetune.num_epochs) == (7, None)
    assert steps.finetune.objective == "language_model" and steps.model == base.model
    (root / "epochs.yaml").write_text("finetune: {num_epochs: 2}\nrun: {num_steps: 5}\n")
    words = (str(root / "epochs.yaml"), *task(files, "prompts"))
    said_last = finetuned(Path(base.run.dir), root / "new", *words, "run.num_steps=7")
    assert (said_last.run.num_steps, said_last.finetune.num_epochs) == (7, None)
    at_once = finetuned(Path(base.run.dir), root / "new", *words)
    assert (at_once.run.num_steps, at_once.finetune.num_epochs) == (12, 2.0), "its own record says both"


def test_a_configuration_file_stands_between_weights_and_overrides(root, base, files):
    source = root / "task.yaml"
    source.write_text(
        "finetune: {objective: classification, freeze: [routers]}\noptimizer: {lr: 0.5, warmup_steps: 1}\n"
        "moe: {balance_loss_coeff: 0.25}\n"
    )
    found = finetuned(Path(base.run.dir), root / "new", str(source), *task(files, "texts"), "optimizer.lr=0.125")
    assert found.finetune.freeze == ("routers",) and found.moe.balance_loss_coeff == 0.25
    assert (found.optimizer.lr, found.optimizer.warmup_steps) == (0.125, 1)
    assert found.moe.num_experts == base.moe.num_experts


def test_a_hugging_face_folder_is_imported_once_and_trains_as_our_checkpoint_does(root, base, files, hf_folder, capfd):
    """On two ranks, by the command; a second call finds the run complete, with more steps it goes on."""
    arguments = [
        "finetune", "--from", str(hf_folder), "--local-ranks", "2", *task(files, "texts"), *QUIET,
        "finetune.objective=classification", "run.global_batch_size=16", "optimizer.lr=0.01", "optimizer.eps=0.001",
        "run.num_steps=4",
        "run.eval_interval_steps=4", f"run.dir={root / 'from_hf'}", "parallel.expert_parallel_size=2",
        "moe.balance_loss=first_choice", "moe.balance_loss_coeff=0.01",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert printed.count("importing") == 1 and "the head of 2 labels is new" in printed
    imported = root / "from_hf" / "base" / "checkpoints" / "step_00000000"
    assert changed_tensors(imported, resumable_checkpoints(base.run.dir)[0]) == set()
    before = (imported / "manifest.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "is complete: step 4 of 4" in capfd.readouterr().out
    longer = finetuned(hf_folder, root / "from_hf", *arguments[5:], "run.num_steps=6", "optimizer.warmup_steps=1")
    train(2, longer)
    printed = capfd.readouterr().out
    assert "importing" not in printed and "resumed at step 4 of 6" in printed
    assert (imported / "manifest.json").stat().st_mtime_ns == before
    another = write_lines(root / "another.jsonl", [{"text": "ab", "label": "early"}, {"text": "cd", "label": "late"}])
    for change, what in (
        (f"finetune.train_files=[{another}]", f"finetune.train_files {files['texts_train']}, not {another}"),
        ("finetune.valid_files=[]", f"finetune.valid_files {files['texts_valid']}, not none"),
        ("finetune.labels=[late,early]", "finetune.labels early, late, not late, early"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"from_hf holds a training with {what}: choose another run")):
            finetuned(hf_folder, root / "from_hf", *arguments[5:], change)
    with pytest.raises(ConfigError, match=r"from_hf holds a training from base/checkpoints, not .*/base/"):
        finetuned(Path(base.run.dir), root / "from_hf", *arguments[5:])
    moved = shutil.copytree(root / "from_hf", root / "moved")
    still = finetuned(hf_folder, moved, *arguments[5:], f"run.dir={moved}")
    assert still.checkpoint.load_from.startswith(str(moved)), "what was imported has moved with the run"
    other = shutil.copytree(hf_folder, root / "other_hf")
    with pytest.raises(ConfigError, match=r"from_hf/base was imported from .*/hf, not from .*/other_hf: choose"):
        finetuned(other, root / "from_hf", *arguments[5:])
    # The same from our own checkpoint, on one rank.
    settings = [each.replace("from_hf", "from_own") for each in arguments[5:]]
    ours = finetuned(Path(base.run.dir), root / "from_own", *settings, "parallel.expert_parallel_size=1")
    train(1, ours)
    theirs = load_config(str(root / "base.yaml"), [f"run.dir={root / 'from_hf'}"])
    assert validations(ours)[0]["valid_loss"] == pytest.approx(validations(theirs)[0]["valid_loss"], rel=1e-5)
    assert results(theirs)["last_step"] == 6


MISTAKES = {
    "no files": ("", r"finetune.train_files is empty: name a JSON Lines file"),
    "no such weights": ("--from nowhere", r"--from nowhere does not exist: name a checkpoint, a run or a Hugging"),
    "no weights there": ("--from {root}", r"--from {root} holds no checkpoint: name one, a run that has one"),
    "the run itself": ("run.dir={base}", r"run.dir {base} is the run that --from names"),
    "two sources": ("one.yaml two.yaml", r'"two.yaml" is no setting: give one CONFIG'),
    "no such source": ("one.yaml", r'no file "one.yaml", nor a preset'),
    "another model": ("{texts} model.hidden_size=64", r"holds another model (model.hidden_size 32 there, 64 here)"),
    "label count": (
        "{texts} model.num_labels=3 finetune.labels=[a,b]", r"finetune.labels names 2 classes, but num_labels is 3"
    ),
    "one class": ("{texts} finetune.objective=classification model.num_labels=1", r"needs two classes at least"),
    "twice": ("{texts} finetune.labels=[a,a]", r'finetune.labels names "a" twice'),
    "unknown label": (
        "{texts} finetune.labels=[early,never]", r'line 1: the label "late" is unknown: finetune.labels names early, n'
    ),
    "a text task with labels": (
        "{prompts} finetune.objective=classification model.num_labels=2", r"line 1: no key 'text'"
    ),
    "a text task without labels": (
        "{prompts} finetune.objective=classification", r'line 1 has no "label": its keys are prompt, completion'
    ),
    "a file that is none": ("finetune.train_files=[nowhere.jsonl]", r"cannot read nowhere.jsonl: No such file"),
    "an empty file": ("finetune.train_files=[{empty}]", r"empty.jsonl holds no examples"),
    "too long": (
        "{texts} finetune.objective=classification model.seq_length=4", r"line 1: the example has 8 tokens, model.seq"
    ),
    "accuracy of a language model": ("{prompts} finetune.best_by=accuracy", r"best_by accuracy is for classification"),
    "a word too much": ("{prompts} finetune.frieze=[]", r'unknown key "finetune.frieze" in the command line: did you'),
    "all frozen": ("{prompts} finetune.freeze=[dense,experts,routers]", r"leaves nothing to train: freeze less"),
    "no routers": ("{prompts} finetune.freeze=[router]", r'finetune.freeze is ["router"] in the command line'),
    "a prompt to a classifier": (
        "{texts} finetune.objective=classification monitor.sample_prompt=a", r"monitor.sample_prompt is continued by a"
    ),
    "a ramp": (
        "{prompts} run.batch_size_ramp={{start: 2, increment: 2, num_samples: 9}}", r"batch_size_ramp is for training"
    ),
    "patience": (
        "finetune.train_files=[{prompts_train}] finetune.stop_after_validations=2", r"needs finetune.valid_files, which"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, root, base, files, capsys):
    text, message = MISTAKES[name]
    places = {
        "root": root, "base": base.run.dir, "texts": " ".join(task(files, "texts")), "empty": root / "empty.jsonl",
        "prompts": " ".join(task(files, "prompts")), "prompts_train": files["prompts_train"],
    }  # fmt: skip
    write_lines(root / "empty.jsonl", [])
    words = text.format(**places).replace(": ", ":~").replace(", ", ",~").split()
    words = [word.replace("~", " ") for word in words]
    start = [] if "--from" in words else ["--from", base.run.dir]
    if "run.dir" not in text:
        words.append(f"run.dir={root / 'wrong'}")
    # On ranks of their own: the launcher tells what they find, in the same words.
    code = main(["finetune", *start, *words, *QUIET, "--local-ranks", "1"])
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert message.format(**places) in error and error.count("\n") == 1, error
    assert not (root / "wrong" / "config.yaml").exists()
