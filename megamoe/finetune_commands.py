"""`megamoe finetune`: from given weights, and what is said of the task, to the configuration of a run. No torch.

A fine-tuning is a run like any other; what is found out here, the model's shape, the number of steps, the labels, is
written into its configuration, so that the same command goes on with it.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.errors import CheckpointError, ConfigError, ConversionError
from megamoe.train_start import add_start_arguments, start_training

if TYPE_CHECKING:
    from megamoe.config.loading import Layer
    from megamoe.config.schema import Config
    from megamoe.launch.environment import RankEnvironment

IMPORTED = "base"  # the folder in the run's where the weights of a Hugging Face folder become a checkpoint
_WARM_UP_SHARE = 0.06
MAX_RECORD_BYTES = 1 << 24
_POLL_SECONDS = 0.5
# What a fine-tuning does that is told nothing else.
_DEFAULTS: Mapping[str, Any] = {
    "optimizer": {"lr": 2e-5, "schedule": "linear", "clip_grad": 1.0},
    "finetune": {"num_epochs": 3.0},
    "run": {"dir": "runs/finetune", "global_batch_size": 32},
}


def add_finetune_commands(commands: Any) -> None:
    """Add `finetune` to the subcommands of `megamoe`."""
    summary = "train on the examples of a task, from given weights"
    parser = commands.add_parser(
        "finetune",
        help=summary,
        description=f"{summary.capitalize()}.",
        epilog="examples:\n"
        "  megamoe finetune --from runs/first finetune.train_files='[task/train.jsonl]' run.dir=runs/task\n"
        "  megamoe finetune task.yaml --from models/OLMoE --local-ranks 2 finetune.freeze='[routers]'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", metavar="[CONFIG|PRESET] section.key=value", nargs="*",
        help="settings that win over those of the checkpoint and the defaults; a preset or YAML file may come first",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="start", metavar="CHECKPOINT|RUN|HF_FOLDER", type=Path, required=True,
        help="a checkpoint's folder, a run's (then its newest checkpoint), or a Hugging Face folder",
    )  # fmt: skip
    add_start_arguments(parser)
    parser.set_defaults(command=_finetune, parser=parser)


def _finetune(options: argparse.Namespace) -> int:
    return start_training(options, lambda environment: resolve_finetune(options.start, options.overrides, environment))


def resolve_finetune(start: Path, settings: Sequence[str], environment: "RankEnvironment") -> "Config":
    """The configuration of a fine-tuning from `start`; a Hugging Face folder is imported first, once.

    settings: as on the command line. Raises MegamoeError for what the user must mend.
    """
    from megamoe.config.loading import Layer, layers_of, resolve
    from megamoe.config.validation import validate_for_training
    from megamoe.topology.updates import check_all_train
    from megamoe.training.checkpoint_state import check_same_model

    sources = [each for each in settings if "=" not in each]
    if len(sources) > 1:
        raise ConfigError(f'"{sources[1]}" is no setting: give one CONFIG, and write section.key=value')
    given = layers_of(sources[0] if sources else None, [each for each in settings if "=" in each])
    layers = [Layer(_DEFAULTS, "the defaults of finetune"), *given]
    has_tokenizer = any("tokenizer" in (layer.tree.get("data") or {}) for layer in given)
    checkpoint = _base(start, resolve(layers), environment, leave_tokenizer=has_tokenizer)
    saved = _saved_config(checkpoint)
    layers = [layers[0], Layer(_inherited(saved), str(checkpoint)), *given]
    layers.append(Layer({"checkpoint": {"load_from": str(checkpoint)}}, "--from"))
    config = resolve([*layers, *_found_out(resolve(layers), given)])
    # What the ranks would find, too, but after the seconds that they need to start.
    validate_for_training(config)
    check_all_train(config)
    check_same_model(saved, config, checkpoint, with_optimizer=False)
    _check_same_task(config)
    if environment.rank == 0:
        _check_examples(config)
    return config


def _base(start: Path, config: "Config", environment: "RankEnvironment", *, leave_tokenizer: bool) -> Path:
    """The checkpoint to begin from. Raises CheckpointError where `start` is none and holds none."""
    from megamoe.checkpoint.folders import complete_checkpoints
    from megamoe.runs.run_folder import checkpoint_at

    run_dir = Path(config.run.dir)
    if (start / "config.json").is_file() and not complete_checkpoints(start / "checkpoints"):
        return checkpoint_at(_imported(start, run_dir / IMPORTED, config, environment, leave_tokenizer))
    if not start.exists():
        raise CheckpointError(f"--from {start} does not exist: name a checkpoint, a run or a Hugging Face folder")
    try:
        found = checkpoint_at(start)
    except CheckpointError:
        raise CheckpointError(
            f"--from {start} holds no checkpoint: name one, a run that has one, or a Hugging Face folder"
        ) from None
    if found.resolve().parent == (run_dir / "checkpoints").resolve():
        raise ConfigError(f"run.dir {run_dir} is the run that --from names: give the fine-tuning a folder of its own")
    return found


def _check_source(folder: Path, out: Path) -> None:
    """What was imported before must be of this folder. Raises ConfigError."""
    from megamoe.checkpoint.files import read_small
    from megamoe.checkpoint.folders import complete_checkpoints
    from megamoe.checkpoint.strict_json import loads

    record = out / "conversion.json"
    try:
        source = loads(read_small(record, MAX_RECORD_BYTES), str(record))["source"]["folder"]
        is_same = Path(source).resolve() == folder.resolve()
    except (CheckpointError, LookupError, TypeError, ValueError):  # a record of something else, or of nothing
        raise ConfigError(
            f"{out} exists, but no {record.name} in it says that it was imported from {folder}: choose another "
            "run.dir, or remove that folder"
        ) from None
    if not is_same:
        raise ConfigError(
            f"{out} was imported from {source}, not from {folder}: choose another run.dir, or remove that folder"
        )
    if not complete_checkpoints(out / "checkpoints"):
        raise ConfigError(f"{out} holds no checkpoint any more: remove that folder to import {folder} again")


def _imported(
    folder: Path, out: Path, config: "Config", environment: "RankEnvironment", leave_tokenizer: bool
) -> Path:
    """`out`, a run's folder made of a Hugging Face one by the first rank; the others wait until it is complete."""
    from megamoe.launch.server import die_with_parent

    if out.exists():
        _check_source(folder, out)
        return out
    if environment.rank == 0:
        print(f"importing {folder} as {out}", flush=True)
        # A process of its own: it needs torch, which must not be here before GPUs are shared out among the ranks.
        command = [sys.executable, "-m", "megamoe", "convert", "from-hf", str(folder), str(out)]
        command += ["--no-tokenizer"] if leave_tokenizer else []
        parent = os.getpid()
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", check=False,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent),
        )  # fmt: skip
        if done.returncode and out.exists():  # another process has imported it meanwhile
            _check_source(folder, out)
        elif done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
            reason = lines[-1].removeprefix("megamoe: ").removeprefix("error: ")
            raise ConversionError(f"{folder} cannot be imported: {reason}")
        return out
    limit = config.checkpoint.save_timeout_seconds
    deadline = time.monotonic() + limit
    while not out.exists():
        if time.monotonic() > deadline:
            raise ConversionError(
                f"{out} was not there within {limit:g} s (checkpoint.save_timeout_seconds): the first rank imports "
                f"{folder}, which `megamoe convert from-hf` can do beforehand"
            )
        time.sleep(_POLL_SECONDS)
    return out


def _check_same_task(config: "Config") -> None:
    """A run that is gone on with must have begun from these weights, on these examples. Raises ConfigError."""
    from megamoe.runs.run_folder import resumable_manifest

    found = resumable_manifest(config.run.dir) if config.checkpoint.resume else None
    if found is None:
        return
    saved = found[1].config
    then, now = saved.get("finetune", {}), config.finetune
    pairs = [
        (
            "from",
            _weights(saved.get("checkpoint", {}).get("load_from"), saved.get("run", {}).get("dir")),
            _weights(config.checkpoint.load_from, config.run.dir),
        ),
        ("with finetune.train_files", _resolved(then.get("train_files")), _resolved(now.train_files)),
        ("with finetune.valid_files", _resolved(then.get("valid_files")), _resolved(now.valid_files)),
        ("with finetune.labels", list(then.get("labels") or ()), list(now.labels)),
    ]
    for what, before, wanted in pairs:
        if before != wanted:
            shown = [", ".join(each) or "none" for each in (before, wanted)]
            raise ConfigError(
                f"{config.run.dir} holds a training {what} {shown[0]}, not {shown[1]}: choose another run.dir, or "
                "remove that folder"
            )


def _weights(checkpoint: str | None, run_dir: str | None) -> list[str]:
    """Where a checkpoint lies, not which one it is: a run's newest may be another by now. What was imported into the
    run's own folder lies there also when that has been moved."""
    if checkpoint is None:
        return []
    folder = Path(checkpoint).resolve().parent
    if run_dir is not None and folder.is_relative_to(Path(run_dir).resolve()):
        return [str(folder.relative_to(Path(run_dir).resolve()))]
    return [str(folder)]


def _resolved(paths: Sequence[str] | None) -> list[str]:
    return [str(Path(path).resolve()) for path in paths or ()]


def _check_examples(config: "Config") -> None:
    """Raises DataError for the first line that is no example of the task."""
    from megamoe.data.example_files import read_records

    for _ in read_records((*config.finetune.train_files, *config.finetune.valid_files), config):
        pass


def _saved_config(checkpoint: Path) -> dict[str, Any]:
    from megamoe.checkpoint.manifest import Manifest

    saved = Manifest.read(checkpoint).config
    if not saved:
        raise CheckpointError(f"{checkpoint} says nothing of its model: give a run's own checkpoint")
    return saved


def _inherited(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that come with the weights: the model, its tokenizer, its precision, and a classifier's labels."""
    tree = {
        "model": saved["model"], "moe": saved["moe"], "data": {"tokenizer": saved["data"]["tokenizer"]},
        "run": {"precision": saved["run"]["precision"]},
    }  # fmt: skip
    if saved["model"].get("num_labels"):
        tree["finetune"] = {"objective": "classification", "labels": saved["finetune"]["labels"]}
    return tree


def _found_out(config: "Config", given: Sequence["Layer"]) -> list["Layer"]:
    """What the files of examples tell: objective and labels where nothing was said, steps from epochs, and by them
    the warm-up and how often to validate and save."""
    from megamoe.config.loading import Layer
    from megamoe.data.example_files import summarize

    def place_of(section: str, key: str) -> int:
        """Of the last layer that says it; -1: none does."""
        return max((i for i, layer in enumerate(given) if key in (layer.tree.get(section) or {})), default=-1)

    def is_given(section: str, key: str) -> bool:
        return place_of(section, key) >= 0

    finetune, model, run, optimizer = config.finetune, {}, {}, {}
    labels = {}
    objective = finetune.objective
    if objective is None:
        objective = "classification" if config.model.num_labels or finetune.labels else "language_model"
    if not finetune.train_files:
        return [Layer({"finetune": {"objective": objective}}, "finetune")]  # the checks say what is missing
    needs_labels = objective == "classification" and not config.model.num_labels
    summary = summarize(finetune.train_files, with_labels=needs_labels and not finetune.labels)
    if needs_labels:
        model = {"num_labels": len(finetune.labels or summary.labels)}
        labels = {} if finetune.labels or summary.are_numbers else {"labels": list(summary.labels)}
    epoch_steps = math.ceil(summary.num_examples / config.run.global_batch_size)
    num_steps, epochs = config.run.num_steps, finetune.num_epochs
    if place_of("run", "num_steps") > place_of("finetune", "num_epochs"):  # what is said last wins
        epochs = None
    if epochs is not None:
        num_steps = max(1, math.ceil(summary.num_examples * epochs / config.run.global_batch_size))
    if not is_given("optimizer", "warmup_steps"):
        optimizer = {"warmup_steps": min(math.ceil(_WARM_UP_SHARE * num_steps), num_steps - 1)}
    if not is_given("run", "eval_interval_steps"):
        run = {"eval_interval_steps": epoch_steps}
    checkpoint = {} if is_given("checkpoint", "save_interval_steps") else {"save_interval_steps": epoch_steps}
    tree = {
        "model": model, "optimizer": optimizer, "checkpoint": checkpoint, "run": {**run, "num_steps": num_steps},
        "finetune": {"objective": objective, "num_epochs": epochs, **labels},
    }  # fmt: skip
    return [Layer(tree, "finetune")]
