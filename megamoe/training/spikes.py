"""Is the loss of a step a spike, has training diverged? Arithmetic on two numbers a step, the same on all ranks; no
torch.

What a step is compared with is the window of the last losses, spikes among them. Its middle is the median, its spread
the median absolute deviation, times 1.4826 the standard deviation where the noise is normal: up to half of the window
may be spikes and neither moves far, while one spike of 10 nats among 128 steps would triple a plain deviation and hide
the next. A loss that falls, as it does in training, only makes the window's middle high and its spread wide: the guard
sees less, it does not cry wolf. A level that stays up for half a window becomes the window's own: a change of data is
told of for a while, not for ever.

False alarms, counted with the defaults but for `min_rise` 0: with normal noise none in 1.5 million steps, and 3 in a
million where the window has 32 losses, as it has at the beginning; with the heavy tails of a t-distribution of 4
degrees of freedom one in 2000 steps, which `threshold` 16 makes one in 30,000. A loss must also rise by `min_rise`,
which rules out many of these. tests/unit/test_guard_false_alarms.py bounds them.

Divergence is a matter of level: the median of the last `divergence_steps` losses, so at least half of them, is far
above the lowest median that a window has had, however slowly it got there, or worse than guessing. One batch of garbage
is not divergence, whatever its loss.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from megamoe.config.guarding import divergence_action
from megamoe.config.schema import Config

NORMAL_DEVIATIONS = 1.4826  # standard deviations of normal noise in its median absolute deviation

ACTIONS = ("warn", "skip", "roll_back", "stop")  # from the mildest

Kind = Literal["spike", "divergence"]


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step, and what is done about it. `is_refused`: its update is not applied."""

    kind: Kind
    action: str  # one of ACTIONS
    step: int
    loss: float | None  # None: no micro-batch's loss was told
    grad_norm: float
    expected: float | None  # the window's median loss; None: too few losses yet
    reason: str
    is_refused: bool


@dataclass(frozen=True)
class RollBack:
    """A return to the checkpoint of `to_step` because of what was seen at `step`."""

    step: int
    to_step: int
    skipped_samples: int  # consumed after that checkpoint, up to that step: no update of them is in the weights


class Window:
    """The last numbers, in order of time and of size."""

    def __init__(self, size: int) -> None:
        self._in_time: deque[float] = deque(maxlen=size)
        self._in_size: list[float] = []

    def __len__(self) -> int:
        return len(self._in_time)

    def add(self, value: float) -> None:
        if len(self._in_time) == self._in_time.maxlen:
            del self._in_size[bisect_left(self._in_size, self._in_time[0])]
        self._in_time.append(value)
        insort(self._in_size, value)

    def restore(self, values: Iterable[float]) -> None:
        self._in_time.clear()
        self._in_time.extend(values)
        self._in_size = sorted(self._in_time)

    @property
    def median(self) -> float:
        return _median_of_sorted(self._in_size)

    @property
    def spread(self) -> float:
        """The standard deviation, as the median absolute deviation tells it."""
        middle = self.median
        return NORMAL_DEVIATIONS * _median_of_sorted(sorted(abs(value - middle) for value in self._in_size))

    def last(self, count: int) -> list[float]:
        return [self._in_time[index] for index in range(-count, 0)]

    def in_time(self) -> list[float]:
        return list(self._in_time)


class SpikeJudge:
    """Judges each step before its update, from numbers that all ranks share, and remembers what it must.

    `verdict` is that of the step under way. `roll_backs` is the history of the run, which no roll back undoes.
    """

    def __init__(self, config: Config) -> None:
        self.guard = config.guard
        self._action, self._divergence_action = config.guard.action, divergence_action(config.guard)
        self._guessing = math.log(config.model.num_labels or config.model.vocab_size)
        self._overflows = config.run.precision == "fp16"  # its loss scale is found by gradients that are not finite
        self._losses, self._norms = Window(config.guard.window_steps), Window(config.guard.window_steps)
        self._lowest: float | None = None  # of the medians of all windows so far
        self._told: set[Kind] = set()  # what has been warned of and is not over
        self.num_spikes = 0
        self.roll_backs: list[RollBack] = []
        self.verdict: Verdict | None = None

    def refuses(self, step: int, loss: float | None, grad_norm: float) -> bool:
        """Judge step `step` by its mean loss over the global batch and its gradient norm; whether not to apply it."""
        expected = self._losses.median if len(self._losses) >= self.guard.min_window_steps else None
        reasons: dict[Kind, str | None] = {"spike": self._spike_reason(step, loss, grad_norm)}
        self._remember(loss, grad_norm)
        reasons["divergence"] = self._divergence_reason(step)
        actions: dict[Kind, str] = {"spike": self._action, "divergence": self._divergence_action}
        there = [kind for kind, reason in reasons.items() if reason is not None]
        found = [kind for kind in there if actions[kind] != "warn" or kind not in self._told]
        self._told, self.verdict = set(there), None
        is_finite = math.isfinite(grad_norm) and (loss is None or math.isfinite(loss))
        if found:
            kind = max(found, key=lambda each: (ACTIONS.index(actions[each]), each == "divergence"))
            is_refused = actions[kind] != "warn" or not is_finite
            self.verdict = Verdict(kind, actions[kind], step, loss, grad_norm, expected, str(reasons[kind]), is_refused)
            self.num_spikes += 1
            return is_refused
        return not is_finite

    def _spike_reason(self, step: int, loss: float | None, grad_norm: float) -> str | None:
        if loss is not None and not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(grad_norm) and not self._overflows:
            return "the gradient is not finite"
        if step <= self.guard.judge_after_steps:
            return None
        by_loss = None if loss is None else self._loss_reason(loss)
        return by_loss or self._norm_reason(grad_norm)

    def _loss_reason(self, loss: float) -> str | None:
        guard, losses = self.guard, self._losses
        if loss > self._guessing + guard.guessing_margin:
            return self._worse_than_guessing(f"the loss is {loss:.4g}")
        if len(losses) < guard.min_window_steps:
            return None
        limit = losses.median + max(guard.threshold * losses.spread, guard.min_rise)
        if loss <= limit:
            return None
        return f"the loss is {loss:.4g}, median of the last {len(losses)} {losses.median:.4g}, limit {limit:.4g}"

    def _norm_reason(self, grad_norm: float) -> str | None:
        factor, norms = self.guard.grad_norm_factor, self._norms
        if factor is None or len(norms) < self.guard.min_window_steps or not math.isfinite(grad_norm):
            return None
        if grad_norm <= factor * norms.median:
            return None
        return (
            f"the gradient norm is {grad_norm:.4g}, more than {factor:g} times the median of the last {len(norms)}, "
            f"{norms.median:.4g}"
        )

    def _worse_than_guessing(self, words: str) -> str:
        return f"{words}, that of guessing {self._guessing:.4g} (guard.guessing_margin {self.guard.guessing_margin:g})"

    def _remember(self, loss: float | None, grad_norm: float) -> None:
        if math.isfinite(grad_norm):
            self._norms.add(grad_norm)
        if loss is not None and math.isfinite(loss):
            self._losses.add(loss)
            if len(self._losses) >= self.guard.min_window_steps:
                middle = self._losses.median
                self._lowest = middle if self._lowest is None else min(self._lowest, middle)

    def _divergence_reason(self, step: int) -> str | None:
        guard = self.guard
        if step <= guard.judge_after_steps or len(self._losses) < guard.divergence_steps:
            return None
        level = median(self._losses.last(guard.divergence_steps))
        words = f"the median loss of the last {guard.divergence_steps} steps is {level:.4g}"
        if level > self._guessing + guard.guessing_margin:
            return self._worse_than_guessing(words)
        if self._lowest is not None and level > self._lowest + guard.divergence_rise:
            return f"{words}, that of a whole window was {self._lowest:.4g}"
        return None

    @property
    def num_rolled_back_steps(self) -> int:
        return sum(each.step - each.to_step for each in self.roll_backs)

    @property
    def num_rolled_back_samples(self) -> int:
        return sum(each.skipped_samples for each in self.roll_backs)

    def state(self) -> dict[str, Any]:
        """All that a later judge needs to go on alike, as JSON has it."""
        return {
            "losses": self._losses.in_time(),
            "grad_norms": self._norms.in_time(),
            "lowest_median": self._lowest,
            "told": sorted(self._told),
            "num_spikes": self.num_spikes,
            "roll_backs": [asdict(each) for each in self.roll_backs],
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state`; from nothing where there is none."""
        state = state or {}
        self._losses.restore(state.get("losses", ()))
        self._norms.restore(state.get("grad_norms", ()))
        self._lowest, self._told = state.get("lowest_median"), set(state.get("told", ()))
        self.num_spikes = state.get("num_spikes", 0)
        self.roll_backs = [RollBack(**each) for each in state.get("roll_backs", ())]
        self.verdict = None


def _median_of_sorted(values: Sequence[float]) -> float:
    half, is_odd = divmod(len(values), 2)
    return values[half] if is_odd else (values[half - 1] + values[half]) / 2
