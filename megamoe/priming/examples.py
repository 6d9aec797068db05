"""From the lines of a task's files to texts: each example with each choice in place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamoe.errors import DataError
from megamoe.priming.readers import Line, read_lines
from megamoe.priming.tasks import Task
from megamoe.priming.templates import CHOICE, FieldError, Template, lookup, text_of, texts_of


@dataclass(frozen=True)
class Example:
    """One example. `texts[i]` holds choice i in place, `before` is what comes before the choice.

    `unconditional` is what comes before the choice there, where the rule has such a text. `answers` are texts that are
    right, for metrics that compare texts.
    """

    where: str
    choices: tuple[str, ...]
    texts: tuple[str, ...]
    before: str
    correct: frozenset[int]
    unconditional: str | None = None
    answers: tuple[str, ...] = ()

    @property
    def shot(self) -> str:
        """The example with its (first) right choice, as it is shown to the model."""
        return self.texts[min(self.correct)]


def load_examples(task: Task, folder: Path, *, limit: int | None = None) -> list[Example]:
    """The examples to be scored, the first `limit` of them. Raises DataError naming the line."""
    return make_examples(task, read_lines(task.data, folder)[:limit])


def load_pool(task: Task, folder: Path) -> list[Example]:
    """What shots are drawn from; none without a train file. Raises DataError naming the line."""
    return [] if task.train is None else make_examples(task, read_lines(task.train, folder))


def make_examples(task: Task, lines: Sequence[Line]) -> list[Example]:
    """Raises DataError naming the line."""
    made = []
    for line in lines:
        try:
            made.append(_example(task, line))
        except FieldError as error:
            raise DataError(f"{line.where}: {error}") from None
    return made


def _example(task: Task, line: Line) -> Example:
    choices = _choices(task, line)
    correct = _correct(task, line, choices)
    rendered = Template.parse(task.text).render(line.fields)
    before, _, _ = rendered.partition(CHOICE)
    texts = tuple(_tidy(rendered.replace(CHOICE, choice), task) for choice in choices)
    unconditional = None
    if task.unconditional is not None:
        unconditional = _tidy(Template.parse(task.unconditional).render(line.fields).partition(CHOICE)[0], task)
    answers = texts_of(line.fields, task.label.field) if task.label.kind == "texts" else ()
    return Example(line.where, choices, texts, _tidy(before, task), correct, unconditional, answers)


def _choices(task: Task, line: Line) -> tuple[str, ...]:
    if isinstance(task.choices, str):
        found = texts_of(line.fields, task.choices)
    else:
        found = tuple(Template.parse(each).render(line.fields) for each in task.choices)
    choices = tuple(_tidy(each.strip(), task) for each in found)
    if len(choices) < 2:
        raise FieldError(f"{len(choices)} choices: two are needed at least")
    if not all(choices):
        raise FieldError(f"choice {choices.index('')} is empty")
    return choices


def _correct(task: Task, line: Line, choices: Sequence[str]) -> frozenset[int]:
    label = task.label
    if label.kind == "texts":
        wanted = {_tidy(each.strip(), task) for each in texts_of(line.fields, label.field)}
        found = frozenset(i for i, choice in enumerate(choices) if choice in wanted)
        if not found:
            raise FieldError(f'none of field "{label.field}" is among the choices')
        return found
    value = text_of(lookup(line.fields, label.field), label.field).strip()
    if label.kind == "key":
        keys = [key.strip() for key in texts_of(line.fields, label.keys or "")]
        valid = {key: place for place, key in enumerate(keys)}
    else:
        first = 1 if label.kind == "number" else 0
        valid = {str(place + first): place for place in range(len(choices))}
    place = valid.get(value, len(choices))
    if place >= len(choices):
        raise FieldError(f'field "{label.field}" is "{value}", which is no choice; valid: {", ".join(valid)}')
    return frozenset({place})


def _tidy(text: str, task: Task) -> str:
    text = re.sub(r"\n{2,}", "\n", text)
    return re.sub(r" {2,}", " ", text) if task.collapse_spaces else text
