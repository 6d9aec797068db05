"""What one priming is asked for, and the passes over examples that it comes to. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.errors import ConfigError
from megamoe.priming.encoding import TooLong
from megamoe.priming.examples import Example, load_examples, load_pool
from megamoe.priming.readers import digest as data_digest
from megamoe.priming.results import Part, digest
from megamoe.priming.tasks import Task


@dataclass(frozen=True)
class LocatedTask:
    """A task and the folder of its data."""

    task: Task
    folder: Path


@dataclass(frozen=True)
class PrimingSettings:
    """All that a command says, but the model and its layout."""

    tasks: tuple[LocatedTask, ...]
    shots: tuple[int, ...]
    num_draws: int
    seed: int
    too_long: TooLong
    limit: int | None

    def to_tree(self) -> dict[str, Any]:
        tasks = [{"task": each.task.model_dump(mode="json"), "folder": str(each.folder)} for each in self.tasks]
        return asdict(self) | {"tasks": tasks}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "PrimingSettings":
        tasks = tuple(LocatedTask(Task.model_validate(each["task"]), Path(each["folder"])) for each in tree["tasks"])
        return cls(**tree | {"tasks": tasks, "shots": tuple(tree["shots"])})

    def parts_of(self, located: LocatedTask, model: dict[str, Any]) -> list[Part]:
        """The passes of a task; one without shots, as many as there are draws with them.

        model: all that the model's numbers depend on. Raises DataError where a file cannot be read.
        """
        task, found = located.task, []
        data = data_digest(task.data, located.folder)
        pool = None if task.train is None else data_digest(task.train, located.folder)
        rules = task.model_dump(mode="json", exclude={"about", "name"})
        for num_shots in self.shots:
            of_shots = {"pool": pool, "seed": self.seed} if num_shots else {}
            tree = {"model": model, "task": rules, "data": data, "limit": self.limit, "too_long": self.too_long}
            identity = digest(tree | of_shots)
            found += [Part(task.name, num_shots, draw, identity) for draw in range(self.num_draws if num_shots else 1)]
        return found

    def load(self, located: LocatedTask) -> tuple[list[Example], list[Example]]:
        """Examples and what their shots are drawn from. Raises DataError naming the line, ConfigError without a train
        file."""
        needs_pool = any(self.shots)
        if needs_pool and located.task.train is None:
            raise ConfigError(f"task {located.task.name} has no train: file, which shots would be drawn from")
        pool = load_pool(located.task, located.folder) if needs_pool else []
        return load_examples(located.task, located.folder, limit=self.limit), pool


def parse_shots(text: str) -> tuple[int, ...]:
    """ "0,1,4" -> (0, 1, 4). Raises ValueError."""
    found = tuple(int(word) for word in text.split(",") if word.strip().isdecimal())
    if len(found) != len(text.split(",")) or len(set(found)) != len(found):
        raise ValueError(f'"{text}" is no list of different numbers of shots, such as 0,1,4')
    return found


def windows(examples: Sequence[Example], size: int) -> list[tuple[int, Sequence[Example]]]:
    """(number of the first, examples): prompts of all at once would take too much memory."""
    return [(start, examples[start : start + size]) for start in range(0, len(examples), size)]
