"""Many prompts, a few at a time, token by token.

Prompts of a batch differ in length and are padded on the right (see `megamoe.model.decoding`); those of like length are
put together. So many micro-batches are under way as it takes to keep every pipeline stage and data rank busy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megamoe.errors import ConfigError, MegamoeError
from megamoe.generation.choosing import NO_TOKEN, choose
from megamoe.generation.settings import Sampling
from megamoe.inference.model import ForwardModel
from megamoe.inference.rows import TokenRows

Finish = Literal["end", "length", "context"]


@dataclass(frozen=True)
class Limits:
    """When a text ends: at one of `end_ids` (which is kept), after `num_new` tokens, or when it fills the context."""

    num_new: int
    context: int
    end_ids: tuple[int, ...] = ()


@dataclass
class Text:
    """One prompt and what came after it. `number` is its place among all prompts."""

    number: int
    prompt: Sequence[int]
    new: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, token: int, limits: Limits) -> None:
        self.new.append(token)
        if token in limits.end_ids:
            self.finish = "end"
        elif len(self.new) >= limits.num_new:
            self.finish = "length"
        elif len(self.prompt) + len(self.new) >= limits.context:
            self.finish = "context"


def generate(
    model: ForwardModel, prompts: Sequence[Sequence[int]], limits: Limits, sampling: Sampling
) -> Iterator[list[Text]]:
    """Continue every prompt; yields texts that are done, as they come. Collective over all ranks, same on each.

    Raises ConfigError for a prompt that is empty or leaves no room in the context, MegamoeError where the model has no
    finite logits: both on every rank.
    """
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limits.context:
            what = "is empty" if not prompt else f"has {len(prompt)} tokens"
            raise ConfigError(f"prompt {number} {what}: the model continues 1 to {limits.context - 1} tokens")
    width = model.config.run.micro_batch_size
    at_once = width * model.num_data_ranks * model.groups.grid.pipeline
    # The longest first: what does not fit into memory fails at once. Equal lengths stay in order.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for first in range(0, len(order), at_once):
        texts = [Text(number, prompts[number]) for number in order[first : first + at_once]]
        yield from _continue(model, texts, limits, sampling, min(width, len(texts)))


def _continue(
    model: ForwardModel, texts: Sequence[Text], limits: Limits, sampling: Sampling, width: int
) -> Iterator[list[Text]]:
    """All of `texts` together, in micro-batches of `width` rows; the last one's free rows repeat its first."""
    batches = [list(texts[first : first + width]) for first in range(0, len(texts), width)]
    num_slots = min(limits.context, max(len(text.prompt) for text in texts) + limits.num_new) + 1
    caches = [model.new_cache(width, num_slots) for _ in batches]
    longest = max(len(text.prompt) for text in texts)
    rows = [
        TokenRows(_padded([text.prompt for text in _filled(batch, width)], longest), cache=cache,
                  num_new=torch.tensor([len(text.prompt) for text in _filled(batch, width)]))
        for batch, cache in zip(batches, caches, strict=True)
    ]  # fmt: skip
    for step in range(limits.num_new):
        chosen = model.choose(
            rows,
            lambda number, logits, step=step: choose(
                logits, sampling, [text.number for text in _filled(batches[number], width)], step
            ),
        )
        done = []
        for batch, ids in zip(batches, chosen, strict=True):
            for text, token in zip(batch, ids.tolist(), strict=False):
                if text.finish is None:
                    _check(token, text, model)
                    text.add(token, limits)
                    done += [text] if text.finish is not None else []
        if done:
            yield done
        if all(text.finish is not None for text in texts):
            return
        rows = [
            TokenRows(ids[:, None].clamp(min=0), cache=cache, num_new=_growing(batch, width))
            for batch, cache, ids in zip(batches, caches, chosen, strict=True)
        ]


def _check(token: int, text: Text, model: ForwardModel) -> None:
    if token == NO_TOKEN:
        raise MegamoeError(
            f"prompt {text.number}: after {len(text.new)} new tokens the model's logits are not finite: its weights "
            f"have diverged, or run.precision {model.config.run.precision} is too narrow for them"
        )


def _filled(batch: Sequence[Text], width: int) -> list[Text]:
    return [*batch, *[batch[0]] * (width - len(batch))]


def _padded(prompts: Sequence[Sequence[int]], length: int) -> Tensor:
    tokens = torch.zeros((len(prompts), length), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return tokens


def _growing(batch: Sequence[Text], width: int) -> Tensor:
    """1 for each text that goes on: the others stay as long as they are."""
    return torch.tensor([int(text.finish is None) for text in _filled(batch, width)])
