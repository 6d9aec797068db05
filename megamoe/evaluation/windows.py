"""What is scored together with what before it: blocks across documents, or windows over one document after another.

Blocks are training's: block k of context c is given tokens k*c ... k*c + c - 1 and predicts the tokens one later, so
that a corpus of n tokens has (n - 1) // c of them; its first token and what is left at its end are not scored.

A document is read as x = [end of document, t_0, ..., t_(n-1)], since that is what stands before a document in training:
its first token, too, is predicted, from the end id alone. Window k is given x[k*s : k*s + c] (s the stride) and
predicts one later; the first window scores all its predictions, each later one those that no window before it has
scored. So every token, the document's own end id included, is scored once, and has at least c - s tokens before it in
its window, or all that the document has.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megamoe.data.indexed import IndexedDataset
from megamoe.errors import DataError
from megamoe.evaluation.sets import EvaluationSet


@dataclass(frozen=True)
class Window:
    """Tokens of one forward pass. Positions are those of the corpus; `first` is one before it where an end id leads."""

    unit: int  # the document, or the block
    index: int  # the window's number in it
    first: int  # position of the first input
    length: int  # inputs, and predictions
    scored: int  # how many predictions count: the last ones
    begins_document: bool  # the first input is an end id in place of what lies at `first`
    ends_unit: bool

    @property
    def first_scored(self) -> int:
        """Position of the first token whose prediction counts; the others follow it."""
        return self.first + 1 + self.length - self.scored


@dataclass(frozen=True)
class WindowPlan:
    """How one corpus is cut. Needs no memory that grows with it."""

    corpus: IndexedDataset
    reading: str
    context: int
    stride: int
    num_units: int  # blocks, or documents
    end_of_document_id: int
    vocab_size: int

    @property
    def span(self) -> tuple[int, int]:
        """[first, last) positions of all tokens that are scored."""
        if self.reading == "blocks":
            return 1, 1 + self.num_units * self.context
        return 0, self.corpus.document_start(self.num_units)

    @property
    def num_documents(self) -> int:
        """Documents that have a token that is scored."""
        if self.reading == "documents":
            return self.num_units
        starts = range(self.corpus.num_documents)
        before = bisect_right(starts, self.span[0], key=self.corpus.document_start) - 1
        return self.end_document - before

    @property
    def end_document(self) -> int:
        """The number of the first document that begins behind all that is scored."""
        if self.reading == "documents":
            return self.num_units
        return bisect_left(range(self.corpus.num_documents), self.span[1], key=self.corpus.document_start)

    def windows(self, unit: int = 0, index: int = 0) -> Iterator[Window]:
        """All windows in order, from window `index` of `unit` on."""
        if self.reading == "blocks":
            for block in range(unit, self.num_units):
                yield Window(block, 0, block * self.context, self.context, self.context, False, True)
            return
        for document in range(unit, self.num_units):
            first, last = (self.corpus.document_start(number) for number in (document, document + 1))
            yield from self._of_document(document, first, last - first, index)
            index = 0

    def _of_document(self, document: int, first: int, num_tokens: int, index: int) -> Iterator[Window]:
        done = 0 if index == 0 else self.context + (index - 1) * self.stride
        while done < num_tokens:
            start = index * self.stride
            length = min(self.context, num_tokens - start)
            scored = start + length - done
            done += scored
            yield Window(document, index, first - 1 + start, length, scored, start == 0, done == num_tokens)
            index += 1

    def tokens(self, window: Window) -> np.ndarray:
        """Inputs and, one later, what they predict: int64 [length + 1]. Raises DataError for an id that is none."""
        stop = window.first + window.length + 1
        if not window.begins_document:
            return self.corpus.tokens(window.first, stop, vocab_size=self.vocab_size)
        ids = self.corpus.tokens(window.first + 1, stop, vocab_size=self.vocab_size)
        return np.concatenate(([self.end_of_document_id], ids))


def plan_windows(
    corpus: IndexedDataset, settings: EvaluationSet, *, end_of_document_id: int, vocab_size: int
) -> WindowPlan:
    """The plan of a set whose settings leave nothing open. Raises DataError where there is nothing to score."""
    context, most = settings.context_tokens or 1, settings.max_tokens
    num_documents = min(corpus.num_documents, settings.max_documents or corpus.num_documents)
    if settings.reading == "documents":
        if most is not None:
            enough = bisect_left(range(num_documents), most, key=lambda number: corpus.document_start(number + 1))
            num_documents = min(num_documents, enough + 1)
        num_units = num_documents
        if corpus.document_start(num_units) == 0:
            raise DataError(
                f"set {settings.name} has no token in the documents that are chosen ({num_units} of "
                f"{corpus.num_documents}), so that there is nothing to score: choose more with max_documents, or name "
                "other data"
            )
    else:
        num_tokens = corpus.document_start(num_documents)
        num_units = (num_tokens - 1) // context
        if most is not None:
            num_units = min(num_units, most // context)
        if num_units < 1:
            allowed = "" if most is None else f", of which max_tokens allows {most}"
            raise DataError(
                f"set {settings.name} has {num_tokens} tokens{allowed}: one block of context_tokens {context} needs "
                f"{context + 1} to be there and {context} allowed; read documents, or shorten the context"
            )
    return WindowPlan(
        corpus, settings.reading or "blocks", context, settings.stride_tokens or context, num_units,
        end_of_document_id, vocab_size,
    )  # fmt: skip
