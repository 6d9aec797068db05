"""What the judge of losses calls a spike or divergence, what it remembers, and that it goes on from a checkpoint."""

import json
import math
import random
import statistics
from typing import Any

import pytest

from megamoe.config import load_config
from megamoe.training.spikes import NORMAL_DEVIATIONS, SpikeJudge, Window

NAN, INF = math.nan, math.inf
QUIET = tuple(3.0 + 0.01 * (number % 5) for number in range(64))  # median 3.02, median deviation 0.01


def judge_of(*settings: str) -> SpikeJudge:
    quick = ("guard.judge_after_steps=0", "guard.action=skip", "model.vocab_size=50000")
    saving = "checkpoint.save_interval_steps=5"
    return SpikeJudge(load_config("quickstart", [*quick, saving, *(f"guard.{each}" for each in settings)]))


def walk(judge: SpikeJudge, losses: Any, *, norm: float = 1.0, first_step: int = 1) -> list[tuple[int, str, str, bool]]:
    """(step, kind, action, refused) of every verdict."""
    found = []
    for step, loss in enumerate(losses, start=first_step):
        is_refused = judge.refuses(step, loss, norm)
        if judge.verdict is not None:
            assert judge.verdict.is_refused == is_refused
            found.append((step, judge.verdict.kind, judge.verdict.action, is_refused))
    return found


def test_window_is_the_last_numbers_with_their_median_and_spread():
    draw, window, kept = random.Random(1), Window(9), []
    for _ in range(200):
        value = draw.choice((draw.gauss(0, 1), 1.0, -2.0))  # equal ones, too
        window.add(value)
        kept = [*kept, value][-9:]
        middle = statistics.median(kept)
        assert window.in_time() == kept and window.median == middle and window.last(1) == [value]
        assert window.spread == NORMAL_DEVIATIONS * statistics.median(abs(each - middle) for each in kept)


def test_a_spike_is_above_the_median_by_deviations_and_by_the_least_rise():
    limit = 3.02 + 20 * NORMAL_DEVIATIONS * 0.01
    for loss, is_spike in ((limit + 0.001, True), (limit - 0.001, False)):
        judge = judge_of("threshold=20")
        assert walk(judge, (*QUIET, loss)) == ([(65, "spike", "skip", True)] if is_spike else [])
    for loss, is_spike in ((3.53, True), (3.51, False)):
        assert bool(walk(judge_of("threshold=1", "min_rise=0.5"), (*QUIET, loss))) == is_spike


def test_sentences_of_verdicts():
    judge = judge_of("grad_norm_factor=10")
    walk(judge, QUIET)
    judge.refuses(65, 4.0, 1.0)
    assert judge.verdict.reason == "the loss is 4, median of the last 64 3.02, limit 3.139"
    assert judge.verdict.expected == pytest.approx(3.02)
    judge.refuses(66, 3.0, 10.5)
    assert judge.verdict.reason == (
        "the gradient norm is 10.5, more than 10 times the median of the last 65, 1"
    )
    judge.refuses(67, 12.0, 1.0)
    assert judge.verdict.reason == "the loss is 12, that of guessing 10.82 (guard.guessing_margin 1)"
    assert judge.num_spikes == 3


def test_one_huge_spike_does_not_hide_the_next():
    assert [step for step, *_ in walk(judge_of(), (*QUIET, 9.0, 3.0, 3.3, 3.0))] == [65, 67]


def test_nothing_but_what_is_no_number_is_judged_before_its_time():
    judge = judge_of("judge_after_steps=70")
    assert walk(judge, (*QUIET, 9.0, NAN, INF, 3.0, 3.0, 3.0, 9.0)) == [
        (step, "spike", "skip", True) for step in (66, 67, 71)
    ]
    assert walk(judge_of("min_window_steps=64"), (*QUIET[:63], 9.0)) == []


@pytest.mark.parametrize("action", ["warn", "skip", "roll_back", "stop"])
def test_what_is_not_finite_is_never_applied_and_warned_of_once(action):
    judge = judge_of(f"action={action}")
    refused = [judge.refuses(step, loss, norm) for step, (loss, norm) in enumerate(
        ((3.0, 1.0), (NAN, 1.0), (3.0, INF), (NAN, NAN), (3.0, 1.0)), start=1)]  # fmt: skip
    assert refused == [False, True, True, True, False]
    assert judge.num_spikes == (1 if action == "warn" else 3)


def test_fp16_overflows_are_the_loss_scales_business():
    config = load_config("quickstart", ["run.precision=fp16", "guard.action=stop", "guard.grad_norm_factor=10"])
    judge = SpikeJudge(config)
    for step in range(1, 301):
        assert judge.refuses(step, 3.0, INF if step % 3 == 0 else 1.0) == (step % 3 == 0)  # not applied, not judged
        assert judge.verdict is None
    assert judge.refuses(301, NAN, INF) and judge.verdict.kind == "spike"


def test_a_warning_comes_once_for_spikes_in_a_row_and_applies_them():
    judge = judge_of("action=warn")
    found = walk(judge, (*QUIET, 9.0, 9.0, 9.0, 3.0, 9.0))
    assert found == [(65, "spike", "warn", False), (69, "spike", "warn", False)]


def test_a_level_that_stays_up_becomes_the_windows_own():
    judge = judge_of("divergence_rise=50")
    steps = [step for step, *_ in walk(judge, (*QUIET, *([3.6] * 128)))]
    assert steps == list(range(65, 129))  # until the window holds as many high ones as low ones


def test_divergence_is_a_median_far_above_the_lowest_level():
    judge = judge_of("threshold=1000", "divergence_steps=16")
    climb = [3.0 + 0.004 * number for number in range(500)]  # too slow for a window of 128
    found = walk(judge, (*QUIET, *climb))
    step, kind, action, is_refused = found[0]
    assert (kind, action, is_refused) == ("divergence", "stop", True)
    assert 4.02 < statistics.median(climb[step - 64 - 16 : step - 64]) < 4.03
    assert judge.verdict.reason.endswith("that of a whole window was 3.02")


def test_one_batch_of_garbage_is_no_divergence_but_half_of_the_last_are():
    spikes = [30.0 if number % 3 == 0 else 3.0 for number in range(48)]
    assert {kind for _, kind, *_ in walk(judge_of(), (*QUIET, *spikes))} == {"spike"}
    found = walk(judge_of(), (*QUIET, *([30.0] * 9)))
    assert [kind for _, kind, *_ in found] == ["spike"] * 7 + ["divergence"] * 2


def test_worse_than_guessing_needs_no_window():
    found = walk(judge_of("min_window_steps=64"), [13.0] * 16)
    assert found == [(step, "spike", "skip", True) for step in range(1, 16)] + [(16, "divergence", "stop", True)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("action=warn",), "warn"),
        (("action=skip",), "stop"),
        (("action=roll_back",), "roll_back"),
        (("action=stop",), "stop"),
        (("action=skip", "divergence_action=roll_back"), "roll_back"),
        (("action=roll_back", "divergence_action=stop"), "stop"),
    ],
)
def test_what_is_done_about_divergence(settings, expected):
    found = walk(judge_of(*settings), (*QUIET, *([9.0] * 12)))
    assert ("divergence", expected) in [(kind, action) for _, kind, action, _ in found]


def test_a_warning_of_divergence_does_not_let_a_spike_pass():
    judge = judge_of("action=skip", "divergence_action=warn")
    found = walk(judge, (*QUIET, *([30.0] * 12)))
    assert len(found) == 12 and all(is_refused for *_, is_refused in found)


def test_state_goes_through_json_and_the_judge_goes_on_alike():
    draw = random.Random(3)
    numbers = [(draw.choice((draw.gauss(3, 0.1), draw.gauss(3, 0.1), 9.0, NAN)), draw.lognormvariate(0, 1))
               for _ in range(400)]  # fmt: skip
    settings = ("action=warn", "grad_norm_factor=5", "divergence_rise=0.05", "divergence_steps=8")
    for cut in (0, 1, 40, 150, 399):
        whole, first, second = (judge_of(*settings) for _ in range(3))
        for step, (loss, norm) in enumerate(numbers[:cut]):
            assert first.refuses(step, loss, norm) == whole.refuses(step, loss, norm)
        second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        for step, (loss, norm) in enumerate(numbers[cut:], start=cut):
            assert second.refuses(step, loss, norm) == whole.refuses(step, loss, norm)
            assert str(second.verdict) == str(whole.verdict)
        assert second.state() == whole.state()


def test_a_checkpoint_without_the_guards_state_begins_anew():
    judge = judge_of()
    walk(judge, (*QUIET, 9.0))
    judge.restore(None)
    assert judge.state() == judge_of().state()
