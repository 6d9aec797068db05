"""What a study leaves behind: study.jsonl, speedup.csv, a page and its main pictures, each replaced as one act.

No torch.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megamoe.checkpoint.files import replace_file
from megamoe.errors import OutputError
from megamoe.study.gaps import find_gaps, with_reasons
from megamoe.study.html import html_study
from megamoe.study.ladder import StudyRun
from megamoe.study.pictures import METHOD_NAMES, cost_picture, domain_name, speedup_picture
from megamoe.study.points import POINTS_FILE, Point, domains_of, write_points
from megamoe.study.schema import StudySettings
from megamoe.study.scoring import collect_points
from megamoe.study.speedup import Speedup, analyse
from megamoe.study.svg_files import svg_file
from megamoe.study.training import Failure

SPEEDUP_FILE, PAGE, PICTURES = "speedup.csv", "index.html", "pictures"
COLUMNS = (
    "domain", "cost", "method", "target_nats_per_token", "baseline_cost", "compared_cost", "factor", "low", "high",
    "share_of_replicates",
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """Lines for the reader; whether every run is trained and has a finite loss at all its checkpoints."""

    lines: tuple[str, ...]
    is_complete: bool


def write_study(study: StudySettings, runs: Sequence[StudyRun], failures: Sequence[Failure]) -> Written:
    """Raises OutputError where the folder cannot be written, or a file of results is none."""
    folder = study.folder
    points = collect_points(runs, folder, vocab_size=study.analysis.compute_vocab_size)
    gaps = find_gaps(runs, points, folder)
    missing = [gap.text for gap in gaps]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_points(folder / POINTS_FILE, points)  # first: what was measured does not wait for what is made of it
        factors = with_reasons(analyse(points, study.analysis), points, gaps, study.analysis)
        replace_file(folder / SPEEDUP_FILE, csv_text(factors).encode())
        replace_file(folder / PAGE, html_study(study, runs, points, factors, failures, missing).encode())
        (folder / PICTURES).mkdir(exist_ok=True)
        for name, text in picture_files(study, points, factors):
            replace_file(folder / PICTURES / name, text.encode())
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}): choose another folder with --out") from None
    lines = [*(f"missing: {text}" for text in missing), *headline(study, factors)]
    lines += [str(folder / name) for name in (POINTS_FILE, SPEEDUP_FILE, PAGE)]
    return Written(tuple(lines), not missing)


def picture_files(
    study: StudySettings, points: Sequence[Point], factors: Sequence[Speedup]
) -> Iterator[tuple[str, str]]:
    """Names and contents of the main pictures of each domain as files of their own."""
    for domain in domains_of(points):
        drawn = {
            "loss": cost_picture(points, domain),
            "speedup": speedup_picture(factors, study.analysis, domain, "paper_flops"),
            "speedup_in_time": speedup_picture(factors, study.analysis, domain, "train_seconds"),
        }
        yield from ((f"{name}_{domain}.svg", svg_file(picture)) for name, picture in drawn.items() if picture)


def headline(study: StudySettings, factors: Sequence[Speedup]) -> list[str]:
    """One line for each domain: the factor in compute and in time, or why there is none."""
    lines = []
    for each in factors:
        if each.method == "trained" and each.cost in ("paper_flops", "train_seconds"):
            what = {"paper_flops": "compute", "train_seconds": "time"}[each.cost]
            lines.append(f"{domain_name(each.domain)}, {what}: {told(each, study)}")
    return lines


def told(each: Speedup, study: StudySettings) -> str:
    """The factor in the middle of the targets, with its interval and the range over all of them."""
    if not len(each.targets):
        return f"no factor, {each.reason}"
    middle = len(each.targets) // 2
    known = each.factors[~np.isnan(each.factors)]
    words = each.interval_text(middle)
    interval = f", {study.analysis.confidence:.0%} interval {words}" if words else ""
    return (
        f"{study.analysis.baseline} takes {each.factors[middle]:.2f} times what {study.analysis.compared} takes to "
        f"reach {each.targets[middle]:.3f} nats a token{interval}; over all targets {known.min():.2f} to "
        f"{known.max():.2f}, {METHOD_NAMES[each.method]}"
    )


def csv_text(factors: Sequence[Speedup]) -> str:
    """A row for each target; numbers with all their digits, empty where there is none: an interval's open end too."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(COLUMNS)
    for each in factors:
        columns = (
            each.targets, each.baseline_costs, each.compared_costs, each.factors,
            np.where(each.low == 0.0, math.nan, each.low), np.where(np.isinf(each.high), math.nan, each.high),
            each.shares,
        )  # fmt: skip
        for values in zip(*(column.tolist() for column in columns), strict=True):
            rows.writerow(
                [each.domain, each.cost, each.method, *("" if value != value else repr(value) for value in values)]
            )
    return file.getvalue()
