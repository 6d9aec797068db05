"""Prompts as tokens, and which of them a rule scores. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megamoe.data.tokenizers import Tokenizer
from megamoe.errors import DataError
from megamoe.priming.examples import Example
from megamoe.priming.tasks import Newlines, Rule

TooLong = Literal["drop-shots", "cut", "refuse"]


@dataclass(frozen=True)
class Scored:
    """A text of which tokens [start, end) are scored; each of them has one before it."""

    tokens: tuple[int, ...]
    start: int
    end: int

    @property
    def num_scored(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Prompt:
    """An example with its shots: a text for each choice, and for each the unconditional one where the rule has it."""

    texts: tuple[Scored, ...]
    unconditional: tuple[Scored, ...] = ()
    num_dropped_shots: int = 0
    num_cut_texts: int = 0


@dataclass
class Encoder:
    """Text to ids by a task's rules. Lines are kept: shots come up again and again."""

    tokenizer: Tokenizer
    newlines: Newlines
    document_start: bool
    _lines: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def ids(self, text: str, *, shots: Sequence[str] = (), start: bool | None = None) -> tuple[int, ...]:
        """Ids of the shots and the text, joined by newlines; start: as document_start where nothing is said."""
        joined = "\n".join([*shots, text])
        while "\n\n" in joined:
            joined = joined.replace("\n\n", "\n")
        end = self.tokenizer.end_of_document_id
        found = [end] if (self.document_start if start is None else start) else []
        if self.newlines == "as_is":
            return (*found, *self.tokenizer.encode(joined))
        for number, line in enumerate(joined.split("\n")):
            found += [end] if number else []
            found += self._line(line)
        return tuple(found)

    def _line(self, line: str) -> tuple[int, ...]:
        if line not in self._lines:
            self._lines[line] = tuple(self.tokenizer.encode(line))
        return self._lines[line]


def make_prompt(
    encoder: Encoder, rule: Rule, example: Example, shots: Sequence[str], *, max_tokens: int, too_long: TooLong
) -> Prompt:
    """The example after its shots, no text with more than `max_tokens` tokens before its last one, the unconditional
    ones included.

    too_long: "drop-shots" leaves shots out from the front, and raises where the example alone is too long; "cut" does
    that, too, and cuts that from the front; "refuse" raises at once. Raises DataError naming the line.
    """
    unconditional: tuple[Scored, ...] = ()
    if example.unconditional is not None:
        unconditional = _choices_after(
            encoder, example.unconditional, [example.unconditional + choice for choice in example.choices], ()
        )
    for num_dropped in range(len(shots) + 1):
        texts = (*_score(encoder, rule, example, shots[num_dropped:]), *unconditional)
        longest = max(len(text.tokens) - 1 for text in texts)
        if longest <= max_tokens or (too_long == "refuse"):
            break
    num_cut = 0
    if longest > max_tokens:
        if too_long != "cut":
            with_shots = too_long == "refuse" and len(shots) > 0
            rest = f" with {len(shots)} shots" if with_shots else ""
            remedy = "drop-shots leaves shots out" if with_shots else "cut cuts its beginning off"
            raise DataError(
                f"{example.where}: {longest} tokens{rest} do not fit into the model's {max_tokens}; "
                f"--too-long {remedy}"
            )
        num_cut = sum(len(text.tokens) - 1 > max_tokens for text in texts)
        texts = tuple(_cut(text, max_tokens, example.where) for text in texts)
    num_choices = len(example.choices)
    return Prompt(texts[:num_choices], texts[num_choices:], num_dropped, num_cut)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with."""
    shortest = min(len(text) for text in texts)
    first = texts[0]
    return next((i for i in range(shortest) if any(text[i] != first[i] for text in texts)), shortest)


def _score(encoder: Encoder, rule: Rule, example: Example, shots: Sequence[str]) -> tuple[Scored, ...]:
    if rule in ("sum_of_choice", "sum_minus_unconditional"):
        return _choices_after(encoder, example.before, example.texts, shots)
    texts = _encode(encoder, example.texts, shots)
    if rule == "sum_of_suffix":
        count = common_prefix([text[::-1] for text in texts])
        count = min(count, min(len(text) for text in texts) - 1)  # the first token has none before it
        if count == 0:
            raise DataError(f"{example.where}: nothing common follows the choices, which sum_of_suffix scores")
        return tuple(Scored(text, len(text) - count, len(text)) for text in texts)
    # A choice may be the beginning of another: something of it must be left.
    shared = min(common_prefix(texts), min(len(text) for text in texts) - 1)
    if shared == 0:  # the first token is scored too: it must have one before it
        texts = [(encoder.tokenizer.end_of_document_id, *text) for text in texts]
        shared = 1
    return tuple(Scored(text, shared, len(text)) for text in texts)


def _choices_after(
    encoder: Encoder, before: str, whole: Sequence[str], shots: Sequence[str]
) -> tuple[Scored, ...]:
    """Choices after what stands before them. White space between belongs to the choice: tokens begin with it."""
    shown = before.rstrip()
    texts = [encoder.ids(text, shots=shots) for text in whole]
    if shown or shots:
        start = len(encoder.ids(shown, shots=shots) if shown else encoder.ids(shots[-1], shots=shots[:-1]))
    else:
        start = int(encoder.document_start)
    if start == 0:
        texts, start = [(encoder.tokenizer.end_of_document_id, *text) for text in texts], 1
    return tuple(Scored(text, min(start, len(text) - 1), len(text)) for text in texts)


def _encode(encoder: Encoder, texts: Sequence[str], shots: Sequence[str]) -> list[tuple[int, ...]]:
    return [encoder.ids(text, shots=shots) for text in texts]


def _cut(text: Scored, max_tokens: int, where: str) -> Scored:
    excess = max(0, len(text.tokens) - 1 - max_tokens)
    if text.start - excess < 1:
        raise DataError(f"{where}: {text.num_scored} tokens are to be scored, more than the model's {max_tokens}")
    return Scored(text.tokens[excess:], text.start - excess, text.end - excess)
