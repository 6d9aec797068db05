"""The result of a priming: JSON for programs, a table for people, and what has to be said. No torch."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.priming.metrics import summary
from megamoe.priming.results import FORMAT, sample_lines, write_whole
from megamoe.priming.settings import PrimingSettings
from megamoe.printing import printing

_COLUMNS = (
    ("task", "{}"), ("num_shots", "{}"), ("num_draws", "{}"), ("num_examples", "{}"), ("accuracy", "{:.4f}"),
    ("standard_error", "{:.4f}"), ("spread", "{:.4f}"), ("f1", "{:.4f}"), ("exact_match", "{:.4f}"),
)  # fmt: skip
_HEADS = {
    "num_shots": "shots", "num_draws": "draws", "num_examples": "examples", "standard_error": "std. error",
    "exact_match": "exact match",
}  # fmt: skip


def finish(
    config: Config,
    settings: PrimingSettings,
    payload: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    *,
    num_reused: int,
    seconds: float,
) -> None:
    """Write --out and --samples, print the table or the JSON. Raises OutputError."""
    tree = result(config, settings, payload, parts, num_reused=num_reused, seconds=seconds)
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    if payload["samples"] is not None:
        write_whole(Path(payload["samples"]), sample_lines(parts))
    if payload["out"] is not None:
        write_whole(Path(payload["out"]), text)
    for note in notes(tree["results"]):
        print(note, file=sys.stderr)
    if num_reused:
        print(f"{num_reused} of {len(parts)} passes were done before, and read from {payload['out']}", file=sys.stderr)
    with suppress(BrokenPipeError), printing():  # all is done: who reads no more has seen enough
        print(text if payload["json"] else table(tree["results"]), end="", flush=True)


def result(
    config: Config,
    settings: PrimingSettings,
    payload: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    *,
    num_reused: int,
    seconds: float,
) -> dict[str, Any]:
    """What is written: the model, what it was asked, and a row for each task and number of shots."""
    rows = []
    for (task, num_shots), group in groupby(parts, key=lambda part: (part["task"], part["num_shots"])):
        draws = list(group)
        judged = [[_metrics_of(example) for example in part["examples"]] for part in draws]
        row = {"task": task, "num_shots": num_shots, "num_draws": len(draws), "num_examples": len(judged[0])}
        counts = ("num_dropped_shots", "num_cut_texts", "num_prompt_tokens", "num_not_finite")
        rows.append(row | summary(judged) | {name: sum(part[name] for part in draws) for name in counts})
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size")
    return {
        "format": FORMAT,
        "model": {"path": payload["source"], **payload["model"]},
        "settings": {
            **settings.to_tree(),
            "precision": config.run.precision,
            "micro_batch_size": config.run.micro_batch_size,
            "num_ranks": payload["num_ranks"],
            "layout": {name: getattr(config.parallel, name) for name in sizes},
            "tokenizer": config.data.tokenizer.model_dump(mode="json"),
        },
        "results": rows,
        "num_passes_reused": num_reused,
        "seconds": round(seconds, 3),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns under heads; those that no row has are left out."""
    columns = [(name, form) for name, form in _COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [[_HEADS.get(name, name) for name, _ in columns]]
    cells += [["" if row.get(name) is None else form.format(row[name]) for name, form in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    lines = []
    for line in cells:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append(f"{line[0].ljust(widths[0])}  {rest}\n")
    return "".join(lines)


def notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader of an accuracy should know."""
    for row in rows:
        head = f"{row['task']}, {row['num_shots']} shots:"
        if row["num_dropped_shots"]:
            all_shots = row["num_shots"] * row["num_draws"] * row["num_examples"]
            yield f"{head} {row['num_dropped_shots']} of {all_shots} shots were dropped for want of room"
        if row["num_cut_texts"]:
            yield f"{head} the beginning of {row['num_cut_texts']} texts was cut off for want of room"
        if row["num_not_finite"]:
            yield f"{head} {row['num_not_finite']} examples had scores that are no numbers, and count as wrong"


def _metrics_of(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: example[name] for name in ("accuracy", "exact_match", "f1") if name in example}
