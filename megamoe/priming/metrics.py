"""From scores to what is reported. No torch, no numpy: a few thousand numbers."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megamoe.priming.encoding import Prompt
from megamoe.priming.examples import Example
from megamoe.priming.tasks import Rule, Task


def choice_scores(rule: Rule, prompt: Prompt, sums: Sequence[float], unconditional: Sequence[float]) -> list[float]:
    """What the rule makes of the sums of log-probabilities of each choice, in nats; the highest is the prediction."""
    if rule == "mean_after_prefix":
        return [total / text.num_scored for total, text in zip(sums, prompt.texts, strict=True)]
    if rule == "sum_minus_unconditional":
        return [total - other for total, other in zip(sums, unconditional, strict=True)]
    return list(sums)


def judge(task: Task, example: Example, scores: Sequence[float]) -> dict[str, Any]:
    """Prediction and metrics of one example; of equal scores the first one counts.

    Where a score is no number there is no prediction, which counts as wrong.
    """
    if not all(math.isfinite(score) for score in scores):
        return {"prediction": None, "accuracy": 0.0} | ({"exact_match": 0.0, "f1": 0.0} if is_record(task) else {})
    prediction = max(range(len(scores)), key=lambda place: scores[place])
    found: dict[str, Any] = {"prediction": prediction, "accuracy": float(prediction in example.correct)}
    if is_record(task):
        text = example.choices[prediction]
        found["exact_match"] = max(float(_plain(text) == _plain(answer)) for answer in example.answers)
        found["f1"] = max(_f1(text, answer) for answer in example.answers)
    return found


def is_record(task: Task) -> bool:
    return task.metrics == "record"


def summary(draws: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Means over examples and draws of what `judge` found.

    standard_error: of the accuracy, over examples, each with the mean of its draws. spread: standard deviation of the
    draws' accuracies, none with one draw.
    """
    names = [name for name in draws[0][0] if name != "prediction"]
    by_draw = {name: [mean([each[name] for each in draw]) for draw in draws] for name in names}
    of_examples = [mean(values) for values in zip(*([e["accuracy"] for e in draw] for draw in draws), strict=True)]
    deviation = _deviation(of_examples)
    return {
        **{name: mean(values) for name, values in by_draw.items()},
        "standard_error": None if deviation is None else deviation / math.sqrt(len(of_examples)),
        "spread": _deviation(by_draw["accuracy"]),
        "draw_accuracies": by_draw["accuracy"],
    }


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def _plain(text: str) -> list[str]:
    """Words as ReCoRD and SQuAD compare them: no case, punctuation or articles."""
    text = "".join(each for each in text.lower() if each not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(text: str, answer: str) -> float:
    ours, theirs = _plain(text), _plain(answer)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0
