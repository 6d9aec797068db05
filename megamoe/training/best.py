"""Which validation of a fine-tuning was the best so far, and whether it is time to stop. Plain numbers, no torch.

It is part of a checkpoint's state: a run that goes on from an older checkpoint goes on from what was the best then.
"""

from typing import Any

from megamoe.config.schema import FinetuneConfig


class BestValidation:
    """`steps` are those of the validations that were each better than all before, the best last; `value` is its loss or
    accuracy, `num_since` how many came after it."""

    def __init__(self, finetune: FinetuneConfig) -> None:
        self.by, self._limit = finetune.best_by, finetune.stop_after_validations
        self.steps: list[int] = []
        self.value: float | None = None
        self.num_since = 0

    @property
    def metric(self) -> str:
        """The key in metrics."""
        return f"valid_{self.by}"

    @property
    def has_stopped(self) -> bool:
        return self._limit is not None and self.num_since >= self._limit

    def judge(self, step: int, metrics: dict[str, float]) -> bool:
        """Take in the validation after `step`; whether it is the best. A loss that is no number is no better."""
        value = metrics[self.metric]
        # Negated comparisons would let what is no number in.
        is_better = value == value and (
            self.value is None or (value < self.value if self.by == "loss" else value > self.value)
        )
        if is_better:
            self.steps.append(step)
            self.value, self.num_since = value, 0
        else:
            self.num_since += 1
        return is_better

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"by": self.by, "steps": list(self.steps), "value": self.value, "num_since": self.num_since}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Undo `state`. Values by another measure say nothing of this one's: they are forgotten."""
        known = state is not None and state["by"] == self.by
        self.steps = list(state["steps"]) if known else []
        self.value, self.num_since = (state["value"], state["num_since"]) if known else (None, 0)
