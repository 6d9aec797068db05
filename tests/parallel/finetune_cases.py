"""Tasks that can be learned, runs that learn them, and what is read off their folders."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

from megamoe.checkpoint.compare import differences
from megamoe.checkpoint.reader import Checkpoint
from megamoe.config.schema import Config
from megamoe.finetune_commands import resolve_finetune
from megamoe.launch.environment import rank_environment
from megamoe.runs.metrics import read_metrics
from megamoe.training.examples import ExampleValidator
from megamoe.training.main import run_rank
from tests.harness import run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS

MODEL = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.vocab_size=260",
    "model.seq_length=16", "monitor.wandb_mode=disabled", "monitor.log_interval_steps=4", "parallel.timeout_seconds=60",
    "run.micro_batch_size=2", "run.global_batch_size=16", "optimizer.lr=0.01", "optimizer.eps=0.001",
)  # fmt: skip
MOE = ("moe.num_experts=4", "moe.dropless=true")
COMPLETIONS = {"a": "red", "b": "green", "c": "blue", "d": "black"}


def write_lines(path: Path, trees: list[dict]) -> Path:
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees), encoding="utf-8")
    return path


def write_tasks(root: Path) -> dict[str, Path]:
    """Two languages that share no letter; and four words, each with the letter that calls for it."""
    draw = random.Random(11)
    letters = {"early": "abcdef", "late": "uvwxyz"}

    def texts(count: int) -> list[dict]:
        labels = [draw.choice(["early", "late"]) for _ in range(count)]
        return [
            {"text": "".join(draw.choice(letters[label]) for _ in range(draw.randint(1, 14))), "label": label}
            for label in labels
        ]

    def prompts(count: int) -> list[dict]:
        chosen = [draw.choice(list(COMPLETIONS)) for _ in range(count)]
        return [{"prompt": letter * draw.randint(1, 8), "completion": COMPLETIONS[letter]} for letter in chosen]

    sizes = {"train": 96, "valid": 37}  # the last batch of a validation is not full
    return {
        f"{name}_{split}": write_lines(root / f"{name}_{split}.jsonl", make(count))
        for name, make in (("texts", texts), ("prompts", prompts))
        for split, count in sizes.items()
    }


def task(files: dict[str, Path], name: str) -> tuple[str, ...]:
    return (f"finetune.train_files=[{files[f'{name}_train']}]", f"finetune.valid_files=[{files[f'{name}_valid']}]")


def finetuned(start: Path, run_dir: Path, *settings: str) -> Config:
    """What the command would train."""
    usual = [setting for setting in MODEL if not setting.startswith("model.")]
    return resolve_finetune(start, [*usual, f"run.dir={run_dir}", *settings], rank_environment())


def train_all(trees: list[dict[str, Any]], kill: tuple[int, int] | None) -> None:
    """Each configuration as a run of its own; `kill`: (rank, step) after whose validation and save that rank dies."""
    rendezvous = rank_environment().init_method
    if kill is not None:
        usual = ExampleValidator.after_step

        def after_step(self: ExampleValidator, trainer: Any, result: Any) -> None:
            if (rank_environment().rank, trainer.step) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            usual(self, trainer, result)

        ExampleValidator.after_step = after_step
    for number, tree in enumerate(trees):
        os.environ["MEGAMOE_INIT_METHOD"] = f"{rendezvous}.{number}"
        run_rank({"config": tree})


def train(world: int, *configs: Config, kill: tuple[int, int] | None = None) -> None:
    trees = [config.model_dump(mode="json") for config in configs]
    run_ranks(train_all, world, trees, kill, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def validations(config: Config) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(config.run.dir) / "metrics.jsonl") if "valid_loss" in line]


def results(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "finetune.json").read_text())


def checkpoints(config: Config) -> list[str]:
    return sorted(path.name for path in (Path(config.run.dir) / "checkpoints").glob("step_*"))


def changed_tensors(one: Path, other: Path, kind: str = "weight") -> set[str]:
    with Checkpoint.open(one) as first, Checkpoint.open(other) as second:
        return {each.name for each in differences(first, second, kinds=(kind,) if kind else ())}
