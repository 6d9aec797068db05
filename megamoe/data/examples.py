"""Examples of a task as rows of one length: what is read, what is predicted, and where the loss counts.

A row is an example's tokens, padded on the right to the sequence length. A language model predicts each next token, and
an example ends with the end-of-document id, so that the model learns to stop; prompt and completion are encoded each on
its own, so a space between them belongs to one of the two. A classifier predicts its label at its last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamoe.config.schema import Config
from megamoe.data.batches import Row
from megamoe.data.example_files import Record, read_records
from megamoe.data.order import Permutation
from megamoe.data.tokenizers import Tokenizer, tokenizer_of_model
from megamoe.errors import DataError


@dataclass(frozen=True)
class _Encoded:
    """ids of an example, and the first of them that is predicted. `label`: of a classifier, None else."""

    ids: np.ndarray
    first: int
    label: int | None


class ExampleDataset:
    """Examples in an order that seed and epoch fix, without end; or, without a seed, once in the order of the files:
    rows beyond the last example then count nowhere, so that a last batch may be filled up."""

    corpus_names: tuple[str, ...] = ()

    def __init__(self, examples: Sequence[_Encoded], seq_length: int, pad_id: int, shuffle_seed: int | None) -> None:
        self.num_samples = len(examples)
        self._examples, self._seq_length, self._pad_id, self._seed = examples, seq_length, pad_id, shuffle_seed
        self._order: tuple[int, Permutation] | None = None  # the epoch in use and its permutation (a few integers)

    def example_number(self, index: int) -> int:
        """The example, by its place in the files, that is sample `index`, any integer >= 0."""
        epoch, position = divmod(index, self.num_samples)
        if self._seed is None:
            return position
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, Permutation(self.num_samples, seed=self._seed, stream=0, epoch=epoch))
        return self._order[1](position)

    def row(self, index: int) -> Row:
        """Sample `index` as a row."""
        example, length = self._examples[self.example_number(index)], self._seq_length
        tokens, labels = np.full(length, self._pad_id, np.int64), np.zeros(length, np.int64)
        mask = np.zeros(length, np.bool_)
        ids, counts = example.ids, self._counts(index)
        if example.label is not None:
            tokens[: len(ids)] = ids
            labels[len(ids) - 1] = example.label
            mask[len(ids) - 1] = counts
        else:
            tokens[: len(ids) - 1], labels[: len(ids) - 1] = ids[:-1], ids[1:]
            mask[example.first - 1 : len(ids) - 1] = counts
        return Row(tokens, labels, mask)

    def num_loss_tokens(self, indices: range) -> int:
        """Positions of these samples where the loss counts; of a classifier the number of examples."""
        return sum(self._num_counting(self._examples[self.example_number(i)]) for i in indices if self._counts(i))

    def _counts(self, index: int) -> bool:
        return self._seed is not None or index < self.num_samples

    @staticmethod
    def _num_counting(example: _Encoded) -> int:
        return 1 if example.label is not None else len(example.ids) - example.first


@dataclass(frozen=True)
class ExampleSplits:
    """The examples of a fine-tuning. `notes`: what the user should hear of them, such as how many were cut."""

    train: ExampleDataset
    valid: ExampleDataset | None
    notes: tuple[str, ...] = ()
    test: None = None


def open_examples(config: Config) -> ExampleSplits:
    """Read and encode the files that the section `finetune` names.

    Raises DataError, naming file and line, for what is no example of the task, for one that is too long where that is
    refused, and for a tokenizer that does not fit the model.
    """
    finetune = config.finetune
    tokenizer = tokenizer_of_model(config.data.tokenizer, config.model.vocab_size)
    train, num_cut = _encoded(finetune.train_files, config, tokenizer)
    valid, num_valid_cut = _encoded(finetune.valid_files, config, tokenizer) if finetune.valid_files else ([], 0)
    notes = [
        f"{cut} of {len(examples)} {split} examples were longer than model.seq_length {config.model.seq_length} and cut"
        for split, cut, examples in (("training", num_cut, train), ("validation", num_valid_cut, valid))
        if cut
    ]
    length, pad_id = config.model.seq_length, tokenizer.end_of_document_id
    return ExampleSplits(
        ExampleDataset(train, length, pad_id, config.run.seed),
        ExampleDataset(valid, length, pad_id, None) if valid else None,
        tuple(notes),
    )


def _encoded(paths: Sequence[str], config: Config, tokenizer: Tokenizer) -> tuple[list[_Encoded], int]:
    """The examples of the files, and how many of them were cut."""
    found, num_cut = [], 0
    for record in read_records(paths, config):
        prompt, text = (_ids(part, config, tokenizer) for part in (record.prompt, record.text))
        if record.label is None:
            text.append(tokenizer.end_of_document_id)
        # The last id of a language model is only predicted, never read.
        excess = len(prompt) + len(text) - config.model.seq_length - (record.label is None)
        if excess > 0:
            _check_may_cut(record, config, excess)
            num_cut += 1
        found.append(_example(record, prompt, text, max(excess, 0), config))
    return found, num_cut


def _ids(text: str, config: Config, tokenizer: Tokenizer) -> list[int]:
    if not config.finetune.newlines_end_documents:
        return tokenizer.encode(text)
    lines = tokenizer.encode_batch(text.split("\n"))
    return [token for line in lines for token in (tokenizer.end_of_document_id, *line)][1:]


def _check_may_cut(record: Record, config: Config, excess: int) -> None:
    if config.finetune.too_long == "refuse":
        length = config.model.seq_length
        raise DataError(
            f"{record.where}: the example has {length + excess} tokens, model.seq_length is {length}: raise that, or "
            "cut such examples with finetune.too_long=cut"
        )


def _example(record: Record, prompt: list[int], text: list[int], excess: int, config: Config) -> _Encoded:
    """`excess` ids are cut: off the beginning of the prompt, as long as some of it is left, else off the end."""
    dropped = min(excess, max(len(prompt) - 1, 0))
    prompt = prompt[dropped:]
    ids = [*prompt, *text]
    ids = ids[: len(ids) - (excess - dropped)]
    if record.label is not None:
        if not ids:
            raise DataError(f"{record.where}: the text has no tokens, and a label stands at the last one")
        return _Encoded(np.array(ids, np.int32), len(ids), record.label)
    first = len(prompt) if config.finetune.loss_on == "completion" else 0
    # Nothing comes before the first token to predict it from.
    first = max(first, 1)
    if len(ids) <= first:
        raise DataError(f"{record.where}: no token of the example can be predicted: write more text")
    return _Encoded(np.array(ids, np.int32), first, None)
