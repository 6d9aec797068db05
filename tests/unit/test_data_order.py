"""Shuffles are bijections that change with seed, stream and epoch; blends keep their proportions everywhere."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.data.order import Blend, Permutation

WEIGHTS = st.one_of(
    st.floats(min_value=1e-3, max_value=1e3), st.integers(1, 9).map(float), st.integers(1, 20).map(lambda n: n / 10)
)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, seed, epoch):
    order = Permutation(size, seed=seed, stream=0, epoch=epoch)
    assert sorted(map(order, range(size))) == list(range(size))


def test_permutation_depends_on_seed_stream_and_epoch():
    def first(**changes):
        arguments = {"seed": 1, "stream": 0, "epoch": 0} | changes
        order = Permutation(1000, **arguments)
        return [order(index) for index in range(50)]

    drawn = [first(), first(seed=2), first(stream=1), first(epoch=1)]
    assert first() == drawn[0]
    assert len({tuple(values) for values in drawn}) == 4
    # Runs resume over years and machines: these numbers may never change.
    assert first()[:8] == [941, 89, 786, 40, 749, 815, 16, 82]


def test_permutation_is_even_handed():
    """All 24 orders of 4 things come up about equally often: chi-square with 23 degrees of freedom, far tail."""
    num_draws = 4800
    counts = Counter(tuple(map(Permutation(4, seed=seed, stream=0, epoch=0), range(4))) for seed in range(num_draws))
    expected = num_draws / 24
    assert len(counts) == 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 50


def test_huge_permutation_answers_at_once():
    size = 10**12
    order = Permutation(size, seed=3, stream=0, epoch=0)
    images = [order(index) for index in range(1000)]
    assert len(set(images)) == 1000
    assert 0.4 < sum(images) / 1000 / size < 0.6
    with pytest.raises(IndexError):
        order(size)


def counted(blend: Blend, num_corpora: int, num_samples: int):
    """Yield the counts of each corpus after every sample, checking that positions count up one by one."""
    counts = [0] * num_corpora
    for index in range(num_samples):
        corpus, position = blend.locate(index)
        assert position == counts[corpus]
        counts[corpus] += 1
        yield index + 1, counts


@given(weights=st.lists(WEIGHTS, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_up_to_three_corpora_are_within_one_sample_everywhere(weights):
    total = sum(weights)
    for num_samples, counts in counted(Blend(tuple(weights)), len(weights), 400):
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - weight / total * num_samples) <= 1.0 + 1e-6


@given(weights=st.lists(WEIGHTS, min_size=4, max_size=12))
@settings(max_examples=60, deadline=None)
def test_many_corpora_stay_close_everywhere(weights):
    total = sum(weights)
    for num_samples, counts in counted(Blend(tuple(weights)), len(weights), 400):
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - weight / total * num_samples) < 1.7


def test_proportions_are_exact_over_their_period():
    blend = Blend((0.1, 0.2, 0.7))
    for start in (0, 10, 10**15):
        assert Counter(blend.locate(index)[0] for index in range(start, start + 10)) == {0: 1, 1: 2, 2: 7}


def test_a_rare_corpus_is_not_forgotten():
    blend = Blend((1.0, 1e-4))
    assert Counter(blend.locate(index)[0] for index in range(30_003)) == {0: 30_000, 1: 3}
