"""How often the guard cries wolf over curves on which nothing is wrong, and that it hears the wolf."""

import numpy as np
import pytest

from megamoe.config import load_config
from megamoe.training.spikes import SpikeJudge

NUM_CURVES, NUM_STEPS = 4, 5_000


def falling(generator: np.random.Generator) -> np.ndarray:
    """From guessing down a power law, as a language model's loss does: [NUM_STEPS]."""
    steps = np.arange(1, NUM_STEPS + 1)
    lowest = generator.uniform(1.8, 2.6)
    return lowest + (np.log(50_000) - lowest) * (1 + steps / generator.uniform(10, 100)) ** -generator.uniform(0.3, 0.8)


def correlated(noise: np.ndarray, share: float = 0.9) -> np.ndarray:
    """Each value a share of the one before plus fresh noise: the spread stays that of `noise`."""
    found = noise.copy()
    for number in range(1, len(found)):
        found[number] = share * found[number - 1] + (1 - share**2) ** 0.5 * noise[number]
    return found


NOISES = {
    "normal": lambda generator, size: generator.standard_normal(size),
    "batches alike": lambda generator, size: correlated(generator.standard_normal(size)),
    "heavy tails": lambda generator, size: generator.standard_t(4, size),
    "two corpora": lambda generator, size: generator.standard_normal(size) + 6 * (generator.random(size) < 0.3),
}


def alarms(losses: np.ndarray, norms: np.ndarray | None = None, *settings: str) -> list[tuple[int, str]]:
    judge = SpikeJudge(load_config("quickstart", ["model.vocab_size=50000", *settings]))
    found = []
    for step, loss in enumerate(losses.tolist(), start=1):
        judge.refuses(step, loss, 1.0 if norms is None else float(norms[step - 1]))
        if judge.verdict is not None:
            found.append((step, judge.verdict.kind))
    return found


@pytest.mark.parametrize("deviation", [0.005, 0.03, 0.15])
@pytest.mark.parametrize("noise", NOISES)
def test_false_alarms_are_bounded(noise, deviation):
    """None with normal noise, however it hangs together; with the tails of t(4) at most one in 1000 steps."""
    count = 0
    for number in range(NUM_CURVES):
        generator = np.random.default_rng([number, 5])
        found = alarms(falling(generator) + deviation * NOISES[noise](generator, NUM_STEPS))
        assert not [step for step, kind in found if kind == "divergence"]
        count += len(found)
    assert count <= (NUM_CURVES * NUM_STEPS / 1_000 if noise == "heavy tails" else 0), count


def test_twice_the_threshold_makes_heavy_tails_quiet():
    count = dict.fromkeys((8, 16), 0)
    for threshold in count:
        for number in range(NUM_CURVES):
            generator = np.random.default_rng([number, 6])
            losses = falling(generator) + 0.15 * generator.standard_t(4, NUM_STEPS)
            count[threshold] += len(alarms(losses, None, f"guard.threshold={threshold}"))
    assert 5 * count[16] <= count[8] and count[8] > 0, count


def test_gradient_norms_may_vary_threefold():
    generator = np.random.default_rng(7)
    norms = np.exp(0.5 * correlated(generator.standard_normal(NUM_STEPS)))
    losses = np.full(NUM_STEPS, 3.0)
    assert alarms(losses, norms, "guard.grad_norm_factor=10") == []
    norms[[3000, 3500]] *= 100
    assert [step for step, _ in alarms(losses, norms, "guard.grad_norm_factor=10")] == [3001, 3501]


def test_spikes_are_found_once_the_curve_falls_slowly():
    """Before that the fall over a window counts as spread."""
    for number in range(NUM_CURVES):
        generator = np.random.default_rng([number, 8])
        losses = falling(generator) + 0.03 * generator.standard_normal(NUM_STEPS)
        where = np.sort(generator.choice(np.arange(1500, NUM_STEPS, 10), 30, replace=False))
        losses[where] += generator.uniform(0.6, 5, 30)
        assert [step for step, _ in alarms(losses)] == (where + 1).tolist()


def test_divergence_is_found_soon_after_it_began():
    for number in range(NUM_CURVES):
        generator = np.random.default_rng([number, 9])
        losses = falling(generator) + 0.03 * generator.standard_normal(NUM_STEPS)
        losses[3000:] += np.minimum(5, 0.01 * np.arange(NUM_STEPS - 3000))
        first = next(step for step, kind in alarms(losses) if kind == "divergence")
        assert 3100 <= first <= 3130  # one nat is reached after 100 steps, at half of the last 16 a few later
