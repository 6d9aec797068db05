"""What the report of a study does without, and where that is why a family has no factor. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megamoe.study.ladder import StudyRun
from megamoe.study.points import Point
from megamoe.study.schema import AnalysisSettings
from megamoe.study.scoring import sets_without_loss
from megamoe.study.speedup import Speedup
from megamoe.study.states import is_trained, saved_steps


@dataclass(frozen=True)
class Gap:
    """One thing that a run lacks, in words. `domain`: where it lacks it; None: everywhere."""

    family: str
    text: str
    domain: str | None = None


def find_gaps(runs: Sequence[StudyRun], points: Sequence[Point], folder: Path) -> list[Gap]:
    """In the order of the runs. Raises OutputError for a file that is no results."""
    return [gap for run in runs for gap in _gaps_of(run, points, folder)]


def _gaps_of(run: StudyRun, points: Sequence[Point], folder: Path) -> Iterator[Gap]:
    family = run.model.family
    there = {point.step for point in points if (point.model, point.seed) == (run.model.name, run.seed)}
    lacking = [step for step in run.eval_steps if step not in there]
    if lacking and not is_trained(run):
        yield Gap(family, f"{run.name} is not trained to its end")
    elif lacking:
        saved = saved_steps(run)
        if unscored := [step for step in lacking if step in saved]:
            yield Gap(family, f"{run.name} is not evaluated at {_listed(unscored)}")
        if gone := [step for step in lacking if step not in saved]:
            advice = f"remove {run.dir} to train it again"
            yield Gap(family, f"{run.name} has no checkpoint of {_listed(gone)} to evaluate: {advice}")
    for (name, domain), steps in sets_without_loss(run, folder).items():
        yield Gap(family, f"{run.name} has no finite loss on {name} at {_listed(steps)}", domain)


def _listed(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def with_reasons(
    factors: Sequence[Speedup], points: Sequence[Point], gaps: Sequence[Gap], settings: AnalysisSettings
) -> list[Speedup]:
    """A family of which nothing can be compared has no factor because of what it lacks, and not of what that costs."""
    return [
        replace(each, reason=told) if each.reason and (told := _why(each, points, gaps, settings)) else each
        for each in factors
    ]


def _why(each: Speedup, points: Sequence[Point], gaps: Sequence[Gap], settings: AnalysisSettings) -> str:
    """Nothing where both families have models, or nothing is known to be missing of them."""
    usable = {
        point.family for point in points
        if point.loss(each.domain) is not None and (point.is_final or each.method == "envelope")
    }  # fmt: skip
    for family in (settings.baseline, settings.compared):
        texts = [gap.text for gap in gaps if gap.family == family and gap.domain in (None, each.domain)]
        if family not in usable and texts:
            return texts[0] if len(texts) == 1 else f"{texts[0]} (and {len(texts) - 1} more)"
    return ""
