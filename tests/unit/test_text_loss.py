"""The loss on a text: of literal arithmetic, and refused where there is too little to say."""

import numpy as np
import pytest

from megamoe.errors import DataError
from megamoe.verification import text_loss as module
from megamoe.verification.text_loss import mean_loss, text_loss
from tests.unit.checkpoint_cases import save
from tests.unit.test_checkpoint_tools import model_tensors


def test_the_mean_loss_is_that_of_plain_probabilities():
    logits = np.random.default_rng(0).normal(0, 3, (2, 5, 11)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 11, (2, 5))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    chosen = [probabilities[n, s, labels[n, s]] for n in range(2) for s in range(5)]
    assert mean_loss(logits, labels) == pytest.approx(-np.log(chosen).mean(), rel=1e-9)
    assert mean_loss(logits + 1e4, labels) == pytest.approx(mean_loss(logits, labels), rel=1e-3)  # no overflow


def test_each_token_is_predicted_from_those_before_it(tmp_path, monkeypatch):
    tensors, config = model_tensors()
    config["data"]["tokenizer"] = {"kind": "byte", "path": None}
    folder = save(tmp_path / "checkpoints", 3, tensors, config=config)
    text = tmp_path / "text.txt"
    text.write_text("ab" * 2000, encoding="utf-8")
    seen = []

    def logits(checkpoint, ids):
        """Certain of the token that follows in this text."""
        seen.append((checkpoint, ids))
        following = ids[:, ::-1][:, ::-1].copy()
        following[:] = ids.min() + ids.max() - ids
        return 50.0 * np.eye(300)[following]

    monkeypatch.setattr(module, "own_logits", logits)
    assert text_loss(folder, text) < 1e-6
    (((checkpoint, ids),)) = seen
    assert checkpoint == folder and ids.shape == (4000 // 256, 256)
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(DataError, match=r"has 9 tokens: a loss needs 257 at least"):
        text_loss(folder, text)
    with pytest.raises(DataError, match="cannot be read as text"):
        text_loss(folder, tmp_path / "none.txt")
