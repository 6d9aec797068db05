"""The prompt of every example, shot count and draw, and whether all of them can be made. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megamoe.config.schema import Config
from megamoe.data.tokenizers import build_tokenizer
from megamoe.errors import ConfigError
from megamoe.priming.encoding import Encoder, Prompt, make_prompt
from megamoe.priming.examples import Example
from megamoe.priming.settings import PrimingSettings
from megamoe.priming.shots import check_pool, draw_shots
from megamoe.priming.tasks import Task


@dataclass
class Prompter:
    """Makes the prompts of one task for one model. `pool` is what shots are drawn from."""

    settings: PrimingSettings
    task: Task
    config: Config
    pool: Sequence[Example]
    encoder: Encoder = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = build_tokenizer(self.config.data.tokenizer)
        self.encoder = Encoder(tokenizer, self.task.newlines, self.task.document_start)

    def shots(self, example: Example, number: int, num_shots: int, draw: int) -> list[str]:
        """number: of the example in its file. Raises ConfigError where the pool is too small."""
        drawn = draw_shots(self.pool, example, num_shots, seed=self.settings.seed, draw=draw, number=number)
        return [shot.shot for shot in drawn]

    def prompt(self, example: Example, shots: Sequence[str]) -> Prompt:
        """Raises DataError naming the line where there is no room."""
        return make_prompt(
            self.encoder, self.task.score, example, shots, max_tokens=self.config.model.seq_length,
            too_long=self.settings.too_long,
        )  # fmt: skip


def check(settings: PrimingSettings, config: Config) -> None:
    """Whatever of tasks and data may be refused is refused here, before any model is loaded.

    Raises DataError naming the line, ConfigError.
    """
    names = Counter(each.task.name for each in settings.tasks)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ConfigError(f"two tasks are named {twice}: give one of them another name")
    for located in settings.tasks:
        examples, pool = settings.load(located)
        check_pool(pool, examples, max(settings.shots))
        prompter = Prompter(settings, located.task, config, pool)
        # Shots can be dropped, but the example must fit; where nothing may be dropped, every draw must.
        shots = settings.shots if settings.too_long == "refuse" else (0,)
        for num_shots in shots:
            for draw in range(settings.num_draws if num_shots else 1):
                for number, example in enumerate(examples):
                    prompter.prompt(example, prompter.shots(example, number, num_shots, draw))
