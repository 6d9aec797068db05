"""How well a checkpoint predicts a given text: to hold a model against the one that it was made from."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.data.tokenizers import build_tokenizer
from megamoe.errors import DataError
from megamoe.verification.own_logits import own_logits

MAX_SEQUENCES, MAX_SEQ_LENGTH = 16, 512


def text_loss(checkpoint: Path, text: Path) -> float:
    """Mean loss, in nats a token, of up to 16 sequences from the beginning of a UTF-8 file; drops off, fp32, one rank.

    The tokenizer is the one that the checkpoint's configuration names. Raises DataError where the file cannot be read
    or is shorter than one sequence.
    """
    with Checkpoint.open(checkpoint) as opened:
        config = config_of(opened)
    length = min(config.model.seq_length, MAX_SEQ_LENGTH)
    ids: list[int] = []
    tokenizer = build_tokenizer(config.data.tokenizer)
    for line in _lines(text):
        ids += tokenizer.encode(line)
        if len(ids) > MAX_SEQUENCES * length:
            break
    count = min(MAX_SEQUENCES, (len(ids) - 1) // length)
    if count < 1:
        raise DataError(f"{text} has {len(ids)} tokens: a loss needs {length + 1} at least")
    tokens = np.array([ids[i * length : (i + 1) * length + 1] for i in range(count)], np.int64)
    return mean_loss(own_logits(checkpoint, tokens[:, :-1]), tokens[:, 1:])


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy in nats of logits [n, s, V] and labels [n, s]; perplexity is its exponential."""
    total = 0.0
    for row, wanted in zip(logits, labels, strict=True):
        shifted = row.astype(np.float64) - row.max(-1, keepdims=True)
        total += float((np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(wanted)), wanted]).sum())
    return total / labels.size


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
