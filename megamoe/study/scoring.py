"""Evaluate the checkpoints of a study's runs with `megamoe evaluate`, and make points of what it found. No torch."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamoe.errors import ConfigError, MegamoeError, TrainingInterrupted
from megamoe.evaluation.results import Results, read_results
from megamoe.evaluation.sets import read_sets, settled_sets
from megamoe.inference.settings import forward_settings
from megamoe.progress import StatusLine
from megamoe.report.values import duration
from megamoe.study.ladder import StudyRun
from megamoe.study.points import Point, SetScore
from megamoe.study.processes import last_message, run_command
from megamoe.study.schema import StudySettings
from megamoe.study.states import costs_of, reached_step, saved_checksums, saved_steps
from megamoe.study.training import INTERRUPTED, LOGS, Failure

RESULTS = "evaluations"  # the folder of results beside the runs
STOP_SECONDS = 60.0


def results_path(run: StudyRun, folder: Path) -> Path:
    return folder / RESULTS / f"{run.name}.json"


def score_runs(
    runs: Sequence[StudyRun], study: StudySettings, folder: Path, *, held: Sequence[int]
) -> list[Failure]:
    """Evaluate what is saved and not yet scored; returns what failed. Raises TrainingInterrupted."""
    failures, status = [], StatusLine(sys.stderr)
    for place, run in enumerate(runs, 1):
        saved = saved_steps(run)
        steps = [step for step in run.eval_steps if step in saved]
        if not steps or not _is_wanted(run, steps, folder):
            continue
        name = f"evaluation {place} of {len(runs)}: {run.name}, {len(steps)} checkpoints"
        words = [
            "evaluate", str(run.dir), "--steps", ",".join(map(str, steps)), "--sets", study.evaluation.sets, "--out",
            str(results_path(run, folder)), *study.evaluation.settings,
        ]  # fmt: skip
        words += ["--local-ranks", str(study.local_ranks)] if study.local_ranks else []
        log, started = folder / LOGS / f"{run.name}.evaluate.log", time.monotonic()

        def poll(name: str = name, started: float = started) -> None:
            if status.is_due:
                status.show(f"{name}, {duration(time.monotonic() - started)} so far")

        code = run_command(words, log, poll=poll, stop_seconds=STOP_SECONDS, held=held)
        if code in (INTERRUPTED, 130):
            status.end()
            raise TrainingInterrupted("the evaluation was asked to stop: the same command goes on from there")
        if code:
            failures.append(Failure(run.name, "evaluation", code, last_message(log), str(log)))
        took = duration(time.monotonic() - started)
        status.end(f"{name}: {f'failed, {failures[-1].message}' if code else f'done, {took}'}")
    return failures


def check_evaluation(runs: Sequence[StudyRun], study: StudySettings, folder: Path) -> None:
    """Before hours of training: the sets are there, and scores that are there already are of these sets and settings,
    or unlike ones would stand beside each other. Raises ConfigError, DataError."""
    sets = read_sets(Path(study.evaluation.sets))
    wanted = [text.describe() for text in settled_sets(sets, seq_length=runs[0].config.model.seq_length)]
    config = forward_settings(runs[0].config, study.evaluation.settings, num_ranks=study.local_ranks or 1)
    first: tuple[Path, Mapping[str, Any]] | None = None
    for run in runs:
        path = results_path(run, folder)
        if (results := read_results(path)) is None:
            continue
        tree = results.tree
        if tree.get("sets") != wanted:
            _refuse(path, folder, f"scores of other sets than {study.evaluation.sets} names now")
        if tree.get("precision") != config.run.precision:
            _refuse(path, folder, f"scores in {tree.get('precision')}, where {config.run.precision} is asked for now")
        first = first or (path, tree)
        for key in ("capacity", "device", "tokenizer"):
            if tree.get(key) != first[1].get(key):
                _refuse(path, folder, f"scores of another {key} than {first[0]}")


def _refuse(path: Path, folder: Path, what: str) -> None:
    raise ConfigError(f"{path} holds {what}: move {folder / RESULTS} away, and all models are scored anew")


def _is_wanted(run: StudyRun, steps: Sequence[int], folder: Path) -> bool:
    """Whether something is left to score."""
    try:
        results = read_results(results_path(run, folder))
    except MegamoeError:
        return True
    if results is None or not results.is_complete:
        return True
    return not set(steps) <= _scored(run, results).keys()


def _scored(run: StudyRun, results: Results) -> dict[int, Mapping[str, Any]]:
    """By step, what is whole and of the run as it stands: one that was trained anew has other checkpoints, or has not
    come so far. Those that were removed to free the disk keep their results."""
    saved, reached = saved_checksums(run), reached_step(run)

    def is_of_this_run(step: int, checksum: str) -> bool:
        return saved[step] == checksum if step in saved else step <= reached

    return {
        model["step"]: model
        for model in results.tree["models"]
        if model["is_complete"] and is_of_this_run(model["step"], model["manifest_checksum"])
    }


def collect_points(runs: Sequence[StudyRun], folder: Path, *, vocab_size: int | None) -> list[Point]:
    """A point for each checkpoint of `eval_steps` that is scored, in the order of runs and steps.

    vocab_size: of the paper's formula. Raises OutputError for a file that is no results.
    """
    points = []
    for run in runs:
        results = read_results(results_path(run, folder))
        if results is None:
            continue
        models = _scored(run, results)
        costs = costs_of(run, run.eval_steps)
        for step in run.eval_steps:
            if step in models:
                tokens, cost = step * run.tokens_per_step, costs[step]
                points.append(
                    Point(
                        run.model.name, run.model.family, run.seed, step, tokens, step == run.config.run.num_steps,
                        run.paper_flops(tokens, vocab_size), run.model_flops(tokens), cost.seconds,
                        cost.peak_memory_bytes, run.num_parameters, run.num_active_parameters, _scores(models[step]),
                    )
                )  # fmt: skip
    return points


def sets_without_loss(run: StudyRun, folder: Path) -> dict[tuple[str, str], list[int]]:
    """Steps at which the model has no finite loss, by a set's name and domain. Raises OutputError as above."""
    found: dict[tuple[str, str], list[int]] = {}
    results = read_results(results_path(run, folder))
    models = {} if results is None else _scored(run, results)
    for step in run.eval_steps:
        for each in models[step]["sets"] if step in models else ():
            if each["nats_per_token"] is None:
                found.setdefault((each["name"], each["domain"]), []).append(step)
    return found


def _scores(model: Mapping[str, Any]) -> dict[str, SetScore]:
    """By set. Domains with a set on which the model has no finite loss are left out: the mean of the others would be of
    other texts than other models'."""
    unknown = {each["domain"] for each in model["sets"] if each["nats_per_token"] is None}
    found = {}
    for each in model["sets"]:
        if each["domain"] in unknown:
            continue
        error, size = each["nats_per_token_standard_error"], each["num_text_bytes"]
        # bits a byte are nats a token but for a factor that the text fixes
        factor = each["num_tokens"] / (math.log(2) * size) if size else None
        found[each["name"]] = SetScore(
            each["domain"], each["num_tokens"], each["nats_per_token"], error, each["bits_per_byte"],
            None if error is None or factor is None else error * factor,
        )  # fmt: skip
    return found
