"""Log-probabilities of texts that share a beginning, under every layout: those of transformers, text by text.

One launch for each number of ranks goes through all models, layouts and batch sizes.
"""

from typing import Any

import numpy as np
import pytest
import torch

from megamoe.priming.batching import Family, family_of
from megamoe.priming.encoding import Scored
from megamoe.priming.scoring import log_probabilities
from tests.parallel.forward_worlds import both_sides, model_of
from tests.parallel.worlds import parallel
from tests.unit.convert_cases import VOCAB

MODELS = ("qwen3 moe", "custom", "xglm")
DENSE = ("xglm",)
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"one": ()},
    2: {"tp2": parallel(tp=2), "pp2": parallel(pp=2), "ep2": parallel(ep=2), "dp2": ()},
    8: {"tp2 pp2 ep2": parallel(tp=2, pp=2, ep=2), "tp2 etp2 ep4": parallel(tp=2, etp=2, ep=4)},
}
BATCH_SIZES = (1, 3, 16)
TOLERANCE = 1e-5
pytestmark = pytest.mark.timeout(600)  # the first test waits for all launches


def layouts_of(model: str, size: int) -> dict[str, tuple[str, ...]]:
    return {name: s for name, s in LAYOUTS[size].items() if model not in DENSE or "ep" not in name}


CASES_HERE = [(model, size, name) for model in MODELS for size in LAYOUTS for name in layouts_of(model, size)]


def families() -> list[Family]:
    """All shapes of what a rule makes: long and short beginnings, one token or many scored, one to four texts, scored
    tokens in the middle, texts that share nothing, one the beginning of another."""
    draw = np.random.default_rng(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, VOCAB, count).tolist())

    found = []
    for number in range(9):
        beginning = tokens((11, 8, 8, 5, 3, 2, 1, 1, 0)[number])
        texts = []
        for _ in range((4, 2, 3, 4, 2, 4, 1, 2, 2)[number]):
            ending = tokens(int(draw.integers(1, 5)) + (number == 8))
            text = beginning + ending
            start = max(1, len(beginning) + (len(ending) > 2 and number % 2))
            texts.append(Scored(text, start, len(text) - (number == 3 and len(ending) > 3)))
        found.append(family_of(texts))
    whole = tokens(9)
    found.append(family_of([Scored(whole[:6], 4, 6), Scored(whole, 4, 9)]))
    assert [family.shared for family in found][:2] == [10, 7] and found[8].shared == 0
    return found


def compute_all(size: int, root: str) -> dict[tuple[str, str, int], list[list[float]]]:
    found = {}
    for name in MODELS:
        for layout, settings in layouts_of(name, size).items():
            with model_of(root, name, settings, size) as model:
                for batch_size in BATCH_SIZES:
                    counts: list[int] = []
                    sums = log_probabilities(model, families(), batch_size=batch_size, on_done=counts.append)
                    assert sum(counts) == len(families())
                    found[name, layout, batch_size] = sums
    return found


def theirs(model: torch.nn.Module) -> list[list[float]]:
    """The sums by transformers: each text whole and alone."""
    found = []
    for family in families():
        sums = []
        for text in family.texts:
            ids = torch.tensor(text.tokens)
            with torch.no_grad():
                values = model(ids[None]).logits[0].double().log_softmax(-1)
            sums.append(sum(float(values[i - 1, ids[i]]) for i in range(text.start, text.end)))
        found.append(sums)
    return found


def same(one: object, other: object) -> None:
    assert one == other, "all ranks know all scores"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return both_sides(tmp_path_factory.mktemp("priming"), MODELS, [*LAYOUTS], theirs, compute_all, same=same)


@pytest.mark.parametrize(("model", "size", "layout"), CASES_HERE)
def test_scores_are_those_of_transformers_in_batches_of_any_size(model, size, layout, outcomes):
    expected = outcomes["theirs"][model]
    for batch_size in BATCH_SIZES:
        found = outcomes["ours"][model, layout, batch_size]
        assert [len(each) for each in found] == [len(each) for each in expected]
        for ours, wanted, family in zip(found, expected, families(), strict=True):
            most = max(text.num_scored for text in family.texts)
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE * most)
