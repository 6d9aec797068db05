"""Evaluate the checkpoints of a study's runs with `megamoe evaluate`, and make points of what it found. No torch."""

import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config, TokenizerConfig
from megamoe.data.tokenizers import tokenizer_of_model
from megamoe.errors import ConfigError, MegamoeError, OutputError, TrainingInterrupted
from megamoe.evaluation.corpora import check_sets, describe_tokenizer, open_set, tokenize
from megamoe.evaluation.plan import Capacity, header
from megamoe.evaluation.results import Results, read_results
from megamoe.evaluation.sets import TextSet, read_sets, settled_sets
from megamoe.inference.settings import forward_settings
from megamoe.inference.tokenizer import names_tokenizer
from megamoe.progress import StatusLine
from megamoe.report.values import duration
from megamoe.study.ladder import StudyRun
from megamoe.study.points import Point, SetScore
from megamoe.study.processes import run_command
from megamoe.study.schema import StudySettings
from megamoe.study.states import costs_of, reached_step, saved_checksums, saved_steps
from megamoe.study.training import INTERRUPTED, LOGS, Failure

RESULTS = "evaluations"  # the folder of results beside the runs
STOP_SECONDS = 60.0
_OF_EXPERTS = ("parallel.expert_", "parallel.all_to_all")  # settings of a layout that a model without any refuses


def results_path(run: StudyRun, folder: Path) -> Path:
    return folder / RESULTS / f"{run.name}.json"


def score_runs(
    runs: Sequence[StudyRun], study: StudySettings, folder: Path, *, held: Sequence[int]
) -> list[Failure]:
    """Evaluate what is saved and not yet scored; returns what failed. Raises TrainingInterrupted."""
    failures, status = [], StatusLine(sys.stderr)
    for place, run in enumerate(runs, 1):
        saved, path = saved_steps(run), results_path(run, folder)
        steps, results = [step for step in run.eval_steps if step in saved], read_scores(path)
        if not steps or not _is_wanted(run, steps, results):
            continue
        name = f"evaluation {place} of {len(runs)}: {run.name}, {len(steps)} checkpoints"
        words = [
            "evaluate", str(run.dir), "--steps", ",".join(map(str, steps)), "--sets", study.evaluation.sets, "--out",
            str(path), *_settings(run, study),
        ]  # fmt: skip
        words += ["--local-ranks", str(study.local_ranks)] if study.local_ranks else []
        log, started = folder / LOGS / f"{run.name}.evaluate.log", time.monotonic()
        if results is not None and _has_another_layout(run, study, results):
            # Sums go on to the bit under their own layout only.
            if lost := sorted(_scored(run, results).keys() - set(saved)):
                failures.append(Failure(run.name, "evaluation", ConfigError.exit_code, _would_lose(lost, path), ""))
                continue
            words.append("--overwrite")

        def poll(name: str = name, started: float = started) -> None:
            if status.is_due:
                status.show(f"{name}, {duration(time.monotonic() - started)} so far")

        code, message = run_command(words, log, poll=poll, stop_seconds=STOP_SECONDS, held=held)
        if code in (INTERRUPTED, 130):
            status.end()
            raise TrainingInterrupted("the evaluation was asked to stop: the same command goes on from there")
        if code:
            failures.append(Failure(run.name, "evaluation", code, message, str(log)))
        took = duration(time.monotonic() - started)
        status.end(f"{name}: {f'failed, {failures[-1].message}' if code else f'done, {took}'}")
    return failures


def _is_wanted(run: StudyRun, steps: Sequence[int], results: Results | None) -> bool:
    """Whether something is left to score."""
    return results is None or not results.is_complete or not set(steps) <= _scored(run, results).keys()


def _settings(run: StudyRun, study: StudySettings) -> tuple[str, ...]:
    """What the file says for all models; one without experts does without what lays them out."""
    return tuple(
        each for each in study.evaluation.settings if run.config.moe.num_experts or not each.startswith(_OF_EXPERTS)
    )


def _has_another_layout(run: StudyRun, study: StudySettings, results: Results) -> bool:
    config, num_ranks = _forward_config(run, study), study.local_ranks or 1
    return results.tree.get("layout") != header(config, num_ranks, (), Capacity(), "")["layout"]


def _would_lose(steps: Sequence[int], path: Path) -> str:
    told = ", ".join(map(str, steps))
    return (
        f"it would be evaluated anew under another layout, but the checkpoints of steps {told} are gone: set "
        f"evaluation.settings and local_ranks as they were, or move {path} away to do without those steps"
    )


def check_evaluation(
    runs: Sequence[StudyRun], study: StudySettings, folder: Path, *, report_only: bool = False
) -> None:
    """Before hours of training: each model can be evaluated as the file says, on sets that are there and can be read,
    and scores that are there already are of these sets and settings, or unlike ones would stand beside each other.

    report_only: nothing is to be evaluated, so that texts and tokenizers need not be there. Raises ConfigError,
    DataError, TopologyError, OutputError.
    """
    found = read_sets(Path(study.evaluation.sets))
    wanted: dict[tuple[int, int, TokenizerConfig], tuple[tuple[TextSet, ...], dict[str, Any]]] = {}
    first: tuple[Path, Mapping[str, Any]] | None = None
    for run in runs:
        config, path = _forward_config(run, study), results_path(run, folder)
        key = (config.model.seq_length, config.model.vocab_size, config.data.tokenizer)
        if key not in wanted:
            texts = settled_sets(found, seq_length=config.model.seq_length, needs_files=not report_only)
            if not report_only:
                _check_texts(texts, config, study)
            wanted[key] = texts, describe_tokenizer(config.data.tokenizer)
        if (results := read_scores(path)) is None:
            continue
        tree, (texts, tokenizer) = results.tree, wanted[key]
        if not _are_the_sets(tree.get("sets", ()), texts, report_only=report_only):
            _refuse(path, folder, f"scores of other sets than {study.evaluation.sets} names now")
        if tree.get("precision") != config.run.precision:
            _refuse(path, folder, f"scores in {tree.get('precision')}, where {config.run.precision} is asked for now")
        if not report_only and tree.get("tokenizer") != tokenizer:
            _refuse(path, folder, "scores by another tokenizer than is asked for now")
        first = first or (path, tree)
        for name in ("capacity", "device", "tokenizer"):
            if tree.get(name) != first[1].get(name):
                _refuse(path, folder, f"scores of another {name} than {first[0]}")


def _refuse(path: Path, folder: Path, what: str) -> None:
    raise ConfigError(f"{path} holds {what}: move {folder / RESULTS} away, and all models are scored anew")


def _forward_config(run: StudyRun, study: StudySettings) -> Config:
    for each in study.evaluation.settings:
        if each.startswith("moe.eval_capacity_"):
            raise ConfigError(
                f"evaluation.settings has {each}: experts drop no token when a study is evaluated, leave it out"
            )
    try:
        return forward_settings(run.config, _settings(run, study), num_ranks=study.local_ranks or 1)
    except MegamoeError as error:
        raise type(error)(f"model {run.model.name} cannot be evaluated as evaluation.settings say: {error}") from None


def _check_texts(texts: Sequence[TextSet], config: Config, study: StudySettings) -> None:
    """As `megamoe evaluate` checks them, and the beginning of each text is tokenized: so much as one block needs, or
    one document. Raises DataError, OutputError."""
    tokenizer, vocab_size = config.data.tokenizer, config.model.vocab_size
    is_named = names_tokenizer(study.evaluation.settings)
    check_sets(texts, tokenizer=tokenizer, vocab_size=vocab_size, names_tokenizer=is_named)
    try:
        with tempfile.TemporaryDirectory(prefix="megamoe-study-") as scratch:
            for number, text in enumerate(texts):
                if text.settings.format == "indexed":
                    continue
                enough = (text.settings.context_tokens or 1) if text.settings.reading == "blocks" else 1
                few = min(enough, text.settings.max_tokens or enough)
                beginning = replace(text, settings=text.settings.model_copy(update={"max_tokens": few}))
                prefix = Path(scratch) / f"{number}"
                tokenize(beginning, tokenizer_of_model(tokenizer, vocab_size), prefix)
                open_set(text, prefix, tokenizer=tokenizer, vocab_size=vocab_size)
    except OSError as error:
        raise OutputError(f"no folder for temporary files can be made ({error.strerror}): set TMPDIR") from None


def _are_the_sets(kept: Sequence[Mapping[str, Any]], texts: Sequence[TextSet], *, report_only: bool) -> bool:
    """Whether results are of these sets, as far as that is known without their files if only a report is made."""
    of_files = ("files", "format") if report_only else ()
    wanted = [text.describe() for text in texts]
    trees = [[{key: each[key] for key in each if key not in of_files} for each in sets] for sets in (kept, wanted)]
    return trees[0] == trees[1]


def read_scores(path: Path) -> Results | None:
    """What `megamoe evaluate` has left there, None where there is nothing. Raises OutputError for anything else."""
    try:
        return read_results(path)
    except OutputError:
        raise OutputError(
            f"{path} holds no results that can be read: move it away, and its model is scored anew"
        ) from None


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
        results = read_scores(results_path(run, folder))
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
    results = read_scores(results_path(run, folder))
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
