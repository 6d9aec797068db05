"""Gradients that do not fit one reduction bucket, and parameters larger than a whole bucket, train alike."""

import numpy as np
import pytest

from megamoe.topology import updates
from tests.harness import run_ranks
from tests.parity.layouts import LAYOUTS, samples
from tests.parity.ranks import RankOutcome, train_layouts

LAYOUT_NAMES = ("w4-paper-tp2-ep2-sp-zero1", "w4-paper_all_capacity-tp2-ep4-zero2-clip=0.5")
BUCKETS = (500, 3000)  # elements: smaller than the embedding, and a handful for the model


def train_with_bucket(bucket: int | None) -> list[RankOutcome]:
    if bucket is not None:
        updates.MAX_REDUCE_BUCKET_ELEMENTS = bucket
    configs = [next(layout for layout in LAYOUTS if layout.name == name).config("sgd") for name in LAYOUT_NAMES]
    return train_layouts(configs, [samples(config, 2) for config in configs])


@pytest.fixture(scope="module")
def whole() -> list[list[RankOutcome]]:
    return run_ranks(train_with_bucket, 4, None, init=False)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_small_buckets_change_nothing(whole: list[list[RankOutcome]], bucket: int) -> None:
    cut = run_ranks(train_with_bucket, 4, bucket, init=False)
    for ours, theirs in zip(cut, whole, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.grad_norms, other.grad_norms, rtol=1e-6)
            for a, b in zip(one.final, other.final, strict=True):
                np.testing.assert_allclose(a.values, b.values, rtol=0, atol=1e-6, err_msg=a.name)
