"""What a task is: a small YAML file beside its data. No torch."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megamoe.config.keys import check_keys
from megamoe.config.loading import parse_yaml
from megamoe.config.schema import Section
from megamoe.errors import ConfigError
from megamoe.priming.templates import Template

Rule = Literal["mean_after_prefix", "sum_of_suffix", "sum_of_choice", "sum_minus_unconditional"]
Newlines = Literal["end_of_document", "as_is"]


class DataFile(Section):
    """One file of examples; paths are relative to the folder of the data, and stay in it.

    jsonl: an object a line. csv: a header, then a row an example. record: the files of ReCoRD, in SuperGLUE's form or
    the original one; every query becomes an example with the fields passage, query, entities, answers.
    """

    file: str
    format: Literal["jsonl", "csv", "record"] = "jsonl"
    labels: str | None = None  # a file with one label a line, which becomes the field "label"


class Label(Section):
    """Which choice is the right one, by a field of the line.

    index: its number from 0. number: from 1. key: the one of `keys` (a list as long as the choices) that it equals.
    texts: a list of texts; each choice that is among them is right.
    """

    field: str
    kind: Literal["index", "number", "key", "texts"] = "index"
    keys: str | None = None

    @model_validator(mode="after")
    def _keys_belong_to_key(self) -> "Label":
        if (self.kind == "key") != (self.keys is not None):
            raise ValueError("keys: is given with kind: key, and only with it")
        return self


class Task(Section):
    """A task of multiple choice.

    text: the example with a choice in place. Scores, by the sum of log-probabilities in nats:
      mean_after_prefix        mean over the tokens after those that all choices' texts begin with
      sum_of_suffix            sum over the tokens that all choices' texts end with
      sum_of_choice            sum over the choice, which ends the text (what lm-evaluation-harness calls acc)
      sum_minus_unconditional  that minus the same of the text `unconditional`
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    about: str = ""  # where the files come from
    data: DataFile
    train: DataFile | None = None  # what shots are drawn from
    text: str
    choices: str | tuple[str, ...]  # the path of a list of texts, or a template for each
    label: Label
    score: Rule = "mean_after_prefix"
    unconditional: str | None = None  # a template with {choice} at its end
    newlines: Newlines = "end_of_document"
    document_start: bool = True  # an end-of-document id stands before each text, as it does in training
    collapse_spaces: bool = True  # two spaces where a field was empty become one
    metrics: Literal["accuracy", "record"] = "accuracy"  # record: F1 and exact match of the chosen entity, too

    @field_validator("text", "unconditional")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and not Template.parse(value).has_choice:
            raise ValueError(f'"{value}" has no place for the choice: {{choice}}, or a field with |fill:MARK')
        return value

    @field_validator("choices")
    @classmethod
    def _choice_templates(cls, value: Any) -> Any:
        if not isinstance(value, str):
            if len(value) < 2:
                raise ValueError("needs two templates at least")
            for each in value:
                if Template.parse(each).has_choice:
                    raise ValueError(f'"{each}" is a choice itself: it takes neither {{choice}} nor |fill:MARK')
        return value

    @model_validator(mode="after")
    def _rule_has_what_it_needs(self) -> "Task":
        ends = {"text": self.text, "unconditional": self.unconditional}
        if (self.score == "sum_minus_unconditional") != (self.unconditional is not None):
            raise ValueError("unconditional: is given with score: sum_minus_unconditional, and only with it")
        if self.score in ("sum_of_choice", "sum_minus_unconditional"):
            for key, value in ends.items():
                if value is not None and not Template.parse(value).ends_with_choice:
                    raise ValueError(f"score: {self.score} needs {key} to end with {{choice}}, and to hold it once")
        if self.metrics == "record" and self.label.kind != "texts":
            raise ValueError("metrics: record compares with the answers that label: {kind: texts} names, and needs it")
        return self


def shipped_tasks() -> dict[str, str]:
    """The YAML of the tasks that come with megamoe, by name."""
    folder = resources.files("megamoe.priming") / "tasks"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_task(source: str, data_folder: Path | None = None) -> tuple[Task, Path]:
    """The task of a YAML file, or a shipped one by its name, and the folder of its data.

    data_folder: where the files lie; None: beside the YAML file. Raises ConfigError: no such task, an unknown or wrong
    key, or a shipped task without a folder.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"the task {source} cannot be read: {reason}") from None
        return parse_task(text, source), data_folder or path.parent
    shipped = shipped_tasks()
    if source not in shipped:
        raise ConfigError(f"{source} is no task: name a YAML file, or one of {', '.join(shipped)}")
    if data_folder is None:
        raise ConfigError(f"the data of {source} is not shipped: say where its files lie, with --data FOLDER")
    return parse_task(shipped[source], source), data_folder


def parse_task(text: str, where: str) -> Task:
    """Raises ConfigError with the key that is wrong."""
    tree = parse_yaml(text, where)
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} is no task: it must hold keys such as name, data, text, choices, label")
    check_keys(tree, where, Task, root=Task)
    try:
        return Task.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("str", "tuple[str, ...]"))
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{what}") from None
