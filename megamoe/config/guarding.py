"""Checks of the guard against spikes and divergence, which `validation` runs."""

from typing import Literal

from megamoe.config.schema import Config, GuardConfig
from megamoe.errors import ConfigError


def divergence_action(guard: GuardConfig) -> Literal["disabled", "warn", "roll_back", "stop"]:
    """What is done about divergence: skipping steps cannot mend it."""
    if guard.action == "disabled":
        return "disabled"
    if guard.divergence_action is not None:
        return guard.divergence_action
    return "stop" if guard.action == "skip" else guard.action


def check_guard(config: Config) -> None:
    """Raises ConfigError where the guard's settings contradict each other or the run's."""
    guard = config.guard
    if guard.action == "disabled":
        if guard.divergence_action is not None:
            raise ConfigError(
                f"divergence_action {guard.divergence_action} needs the guard, but guard.action is disabled: use "
                "guard.action warn, or divergence_action null"
            )
        return
    for key in ("min_window_steps", "divergence_steps"):
        if getattr(guard, key) > guard.window_steps:
            raise ConfigError(
                f"{key} {getattr(guard, key)} is above window_steps {guard.window_steps}: use at most "
                f"{guard.window_steps}"
            )
    if "roll_back" not in (guard.action, guard.divergence_action):
        return
    key = "guard.action" if guard.action == "roll_back" else "divergence_action"
    if config.checkpoint.save_interval_steps == 0:
        raise ConfigError(
            f"{key} roll_back needs checkpoints, but save_interval_steps is 0: use save_interval_steps above 0, or "
            f"{key} {'skip' if guard.action == 'roll_back' else 'stop'}"
        )
