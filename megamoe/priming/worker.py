"""A rank's side of `megamoe prime`: every rank makes the same prompts; rank 0 keeps the record and reports."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.inference.worker import forward_model  # first: it quietens the engines, which others import

# isort: split
import torch
import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.data.tokenizers import build_tokenizer
from megamoe.errors import DataError
from megamoe.inference.model import ForwardModel
from megamoe.priming.batching import families
from megamoe.priming.encoding import Prompt
from megamoe.priming.examples import Example
from megamoe.priming.metrics import choice_scores, judge
from megamoe.priming.prompts import Prompter
from megamoe.priming.report import finish
from megamoe.priming.results import Part, read_parts, write_part
from megamoe.priming.scoring import log_probabilities
from megamoe.priming.settings import LocatedTask, PrimingSettings, windows
from megamoe.priming.tasks import Task
from megamoe.progress import StatusLine

WINDOW = 1024  # examples whose prompts are in memory together


def run_rank(payload: Mapping[str, Any]) -> None:
    """payload: the configuration, the checkpoint, its identity, the settings and the output of the command."""
    config = Config.model_validate(payload["config"])
    settings = PrimingSettings.from_tree(payload["settings"])
    out = None if payload["out"] is None else Path(payload["out"])
    started = time.monotonic()
    # The precision changes the numbers; the layout and the batch do not.
    identity = {"weights": payload["model"]["digest"], "precision": config.run.precision}
    with forward_model(config, Path(payload["checkpoint"])) as model:
        identity |= {"tokenizer": build_tokenizer(config.data.tokenizer).describe()}
        parts = [(each, part) for each in settings.tasks for part in settings.parts_of(each, identity)]
        done = read_parts(out) if dist.get_rank() == 0 else {}
        is_done = _agree(model, [part for _, part in parts], done)
        found = _all_parts(model, settings, parts, is_done, done, out)
    if found is not None:
        seconds = time.monotonic() - started
        finish(config, settings, payload, found, num_reused=sum(is_done), seconds=seconds)


def _agree(model: ForwardModel, parts: Sequence[Part], done: Mapping[Any, Any]) -> list[bool]:
    """Which parts rank 0 has. Raises DataError where ranks read other files than rank 0. Collective."""
    numbers = torch.tensor([int(part.identity[:15], 16) for part in parts], device=model.device)
    theirs = numbers.clone()
    dist.broadcast(theirs, src=0)
    differs = (numbers != theirs).any().to(torch.int64)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if differs.item():
        raise DataError("the ranks read different data: the tasks' files or the tokenizer are not the same everywhere")
    flags = torch.tensor([part.key in done for part in parts], dtype=torch.int64, device=model.device)
    dist.broadcast(flags, src=0)
    return [bool(flag) for flag in flags.tolist()]


def _all_parts(
    model: ForwardModel,
    settings: PrimingSettings,
    parts: Sequence[tuple[LocatedTask, Part]],
    is_done: Sequence[bool],
    done: Mapping[Any, dict[str, Any]],
    out: Path | None,
) -> list[dict[str, Any]] | None:
    """The content of each part, on rank 0; what is not done yet is computed and kept. Collective."""
    is_first = dist.get_rank() == 0
    progress, found = Progress(len(parts)) if is_first else None, []
    current: tuple[LocatedTask, list[Example], Prompter] | None = None  # a task has a part for each draw of shots
    for number, ((located, part), is_there) in enumerate(zip(parts, is_done, strict=True)):
        if not is_there:
            if current is None or current[0] is not located:
                examples, pool = settings.load(located)
                current = located, examples, Prompter(settings, located.task, model.config, pool)
            _, examples, prompter = current
            if progress:
                progress.begin(number, part, len(examples))
            content = compute_part(model, prompter, part, examples, on_done=progress.add if progress else _say_nothing)
            if is_first:
                found.append(write_part(out, part, content))
        elif is_first:
            found.append(done[part.key])
    if progress:
        progress.end()
    return found if is_first else None


def _say_nothing(count: float) -> None:
    pass


def compute_part(
    model: ForwardModel,
    prompter: Prompter,
    part: Part,
    examples: Sequence[Example],
    *,
    on_done: Callable[[float], None] = _say_nothing,
) -> dict[str, Any]:
    """Score every example once. Collective over all ranks."""
    task, found = prompter.task, []
    counts = {"num_dropped_shots": 0, "num_cut_texts": 0, "num_prompt_tokens": 0, "num_not_finite": 0}
    for first, window in windows(examples, WINDOW):
        prompts = [
            prompter.prompt(example, prompter.shots(example, number, part.num_shots, part.draw))
            for number, example in enumerate(window, start=first)
        ]
        size = model.config.run.micro_batch_size
        sums = log_probabilities(model, families(prompts), batch_size=size, on_done=_by_examples(task, on_done))
        found += _judged(task, window, prompts, sums, first, counts)
    return counts | {"examples": found}


def _by_examples(task: Task, on_done: Callable[[float], None]) -> Callable[[int], None]:
    """Families to examples: with an unconditional text an example has two."""
    return lambda count: on_done(count / 2 if task.unconditional is not None else count)


def _judged(
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    sums: Sequence[Sequence[float]],
    first: int,
    counts: dict[str, int],
) -> list[dict[str, Any]]:
    """What is kept of each example. Adds to `counts`."""
    remaining, found = iter(sums), []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True), start=first):
        of_texts = next(remaining)
        unconditional = next(remaining) if prompt.unconditional else []
        scores = choice_scores(task.score, prompt, of_texts, unconditional)
        result = judge(task, example, scores)
        counts["num_dropped_shots"] += prompt.num_dropped_shots
        counts["num_cut_texts"] += prompt.num_cut_texts
        counts["num_prompt_tokens"] += max(len(text.tokens) for text in prompt.texts)
        counts["num_not_finite"] += result["prediction"] is None
        kept = {"number": number, "where": example.where, "correct": sorted(example.correct), **result}
        kept |= {"scores": _plain(scores), "log_probabilities": _plain(of_texts)}
        if unconditional:
            kept["unconditional_log_probabilities"] = _plain(unconditional)
        found.append(kept | {"num_scored_tokens": [text.num_scored for text in prompt.texts]})
    return found


def _plain(values: Sequence[float]) -> list[float | None]:
    """JSON has no infinities."""
    return [value if math.isfinite(value) else None for value in values]


@dataclass
class Progress:
    """How far the parts are, on stderr."""

    num_parts: int
    _line: StatusLine = field(default_factory=lambda: StatusLine(sys.stderr))
    _head: str = ""
    _num_examples: int = 0
    _num_done: float = 0
    _started: float = 0.0

    def begin(self, number: int, part: Part, num_examples: int) -> None:
        self._head = f"[{number + 1}/{self.num_parts}] {part.task}, {part.num_shots} shots, draw {part.draw}"
        self._num_examples, self._num_done, self._started = num_examples, 0, time.monotonic()

    def add(self, count: float) -> None:
        self._num_done += count
        if self._line.is_due:
            rate = self._num_done / max(time.monotonic() - self._started, 1e-9)
            left = (self._num_examples - self._num_done) / max(rate, 1e-9)
            self._line.show(
                f"{self._head}: {self._num_done:.0f} of {self._num_examples} examples, {rate:.1f}/s, {left:.0f} s left"
            )

    def end(self) -> None:
        self._line.end()
