"""Training, validation and test samples: blocks of the sequence length, shuffled and blended without end.

A corpus of n tokens holds (n - 1) // s blocks of sequence length s; block k is tokens k*s to k*s + s inclusive, so
blocks run across documents and the first input of a block is the last label of the one before (fairseq's
`sample-break-mode none`, as in arXiv 2112.10684).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamoe.config.schema import Corpus, DataConfig
from megamoe.data.indexed import IndexedDataset
from megamoe.data.manifest import check_vocabulary
from megamoe.data.order import Blend, Permutation
from megamoe.errors import DataError

SPLIT_NAMES = ("train", "valid", "test")


class BlockDataset:
    """A contiguous range of the blocks of one corpus, in file order or reshuffled every epoch."""

    def __init__(
        self,
        corpus: IndexedDataset,
        blocks: range,
        *,
        seq_length: int,
        vocab_size: int,
        shuffle_seed: int | None = None,
        stream: int = 0,
    ) -> None:
        """`shuffle_seed` None keeps the order of the file; `stream` tells corpora of one blend apart."""
        self.num_samples = len(blocks)
        self._corpus = corpus
        self._blocks = blocks
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._shuffle_seed = shuffle_seed
        self._stream = stream
        self._order: tuple[int, Permutation] | None = None  # the epoch in use and its permutation (a few integers)

    def block_number(self, index: int) -> int:
        """The block of the corpus that is sample `index`, any integer >= 0: a function of (seed, epoch, index)."""
        epoch, position = divmod(index, self.num_samples)
        if self._shuffle_seed is not None:
            if self._order is None or self._order[0] != epoch:
                order = Permutation(self.num_samples, seed=self._shuffle_seed, stream=self._stream, epoch=epoch)
                self._order = (epoch, order)
            position = self._order[1](position)
        return self._blocks[position]

    def sample(self, index: int) -> np.ndarray:
        """Tokens of sample `index`: int64 [seq_length + 1].

        Raises:
            DataError: an id is outside the vocabulary; the message names file, token, id and vocabulary.
        """
        start = self.block_number(index) * self._seq_length
        return self._corpus.tokens(start, start + self._seq_length + 1, vocab_size=self._vocab_size)


class BlendedDataset:
    """Several block datasets read as one, in proportion to their weights.

    An epoch of the blend is as many samples as its members have blocks together. Each member goes through its own
    epochs at its own pace, so a block is never repeated before its corpus has been seen whole.
    """

    def __init__(self, members: Sequence[BlockDataset], weights: Sequence[float], names: Sequence[str] = ()) -> None:
        """`names` are those of the members, where results are told by corpus."""
        self.num_samples = sum(member.num_samples for member in members)
        self.corpus_names = tuple(names)
        self._members = tuple(members)
        self._blend = Blend(tuple(weights))

    def locate(self, index: int) -> tuple[int, int]:
        """(corpus number, block of that corpus) of sample `index`, any integer >= 0."""
        corpus, position = self._blend.locate(index)
        return corpus, self._members[corpus].block_number(position)

    def sample(self, index: int) -> np.ndarray:
        """Tokens of sample `index`: int64 [seq_length + 1]. Raises DataError as `BlockDataset.sample` does."""
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        corpus, position = self._blend.locate(index)
        return self._members[corpus].sample(position)


@dataclass(frozen=True)
class Splits:
    """The samples of a run; `valid` and `test` are None where nothing is set aside for them."""

    train: BlendedDataset
    valid: BlendedDataset | None
    test: BlendedDataset | None


def open_splits(data: DataConfig, *, seq_length: int, vocab_size: int, seed: int) -> Splits:
    """Open every corpus of a run.

    Training samples are shuffled by `seed`; validation and test samples come in file order and start again at the
    end. A split with corpora of its own gets all of them; the others share the blocks of `data.train` in the
    proportions of `data.split`, each in one contiguous piece, as Megatron cuts them.

    Raises:
        DataError: no corpus is named, one is damaged, too small to be cut, or was written for another vocabulary.
    """
    if not data.train:
        raise DataError("data.train names no corpus: give at least one, such as data.train=[{path: corpora/text}]")
    own = {"valid": data.valid, "test": data.test}
    shares = [0.0 if own.get(name) else share for name, share in zip(SPLIT_NAMES, data.split, strict=True)]
    if shares[0] <= 0.0:
        raise DataError(f"data.split {list(data.split)} leaves nothing for training: its first share must be positive")
    opened = [_open(corpus, vocab_size) for corpus in data.train]
    cuts = [cut_blocks(corpus, shares, seq_length) for corpus in opened]
    weights = [corpus.weight for corpus in data.train]

    def blend(split: int, shuffle_seed: int | None) -> BlendedDataset | None:
        if shares[split] <= 0.0:
            return None
        members = [
            BlockDataset(
                corpus,
                cut[split],
                seq_length=seq_length,
                vocab_size=vocab_size,
                shuffle_seed=shuffle_seed,
                stream=number,
            )
            for number, (corpus, cut) in enumerate(zip(opened, cuts, strict=True))
        ]
        return BlendedDataset(members, weights, corpus_names(data.train))

    held_out = {
        name: open_blend(own[name], seq_length=seq_length, vocab_size=vocab_size) if own[name] else blend(split, None)
        for split, name in ((1, "valid"), (2, "test"))
    }
    train = blend(0, seed)
    if train is None:
        raise AssertionError("the share of training was checked above")
    return Splits(train=train, **held_out)


def open_blend(corpora: Sequence[Corpus], *, seq_length: int, vocab_size: int) -> BlendedDataset:
    """Whole corpora in file order, for validation, test and evaluation. Raises DataError as `open_splits` does."""
    members = []
    for corpus in corpora:
        opened = _open(corpus, vocab_size)
        blocks = cut_blocks(opened, [1.0], seq_length)[0]
        members.append(BlockDataset(opened, blocks, seq_length=seq_length, vocab_size=vocab_size))
    return BlendedDataset(members, [corpus.weight for corpus in corpora], corpus_names(corpora))


def corpus_names(corpora: Sequence[Corpus]) -> tuple[str, ...]:
    """What metrics call the corpora of a blend: no two the same; empty for one alone that was given no name."""
    if len(corpora) == 1 and corpora[0].name is None:
        return ()
    names: list[str] = []
    for corpus in corpora:
        name = plain = corpus.name or Path(corpus.path).name
        number = 1
        while name in names:
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return tuple(names)


def _open(corpus: Corpus, vocab_size: int) -> IndexedDataset:
    opened = IndexedDataset(corpus.path)
    check_vocabulary(corpus.path, vocab_size)
    return opened


def cut_blocks(corpus: IndexedDataset, shares: Sequence[float], seq_length: int) -> list[range]:
    """Cut the blocks of a corpus into contiguous ranges in proportion to `shares`.

    Bounds are rounded as Megatron rounds them, then moved so that every positive share holds at least one block.

    Raises:
        DataError: the corpus has fewer blocks than there are positive shares.
    """
    num_blocks = (corpus.num_tokens - 1) // seq_length
    wanted = [1 if share > 0.0 else 0 for share in shares]
    if num_blocks < sum(wanted):
        raise DataError(
            f"{corpus.prefix} holds {corpus.num_tokens} tokens, {num_blocks} blocks of sequence length {seq_length}, "
            f"too few for {sum(wanted)} splits: shorten model.seq_length, change data.split, or bring more text"
        )
    total = sum(shares)
    bounds, running = [0], 0.0
    for number, share in enumerate(shares):
        running += share
        rounded = round(running / total * num_blocks)
        lowest, highest = bounds[-1] + wanted[number], num_blocks - sum(wanted[number + 1 :])
        bounds.append(min(max(rounded, lowest), highest))
    return [range(first, last) for first, last in itertools.pairwise(bounds)]
