"""From a study's settings to its runs: one configuration for each model and seed, and the rules that make them equal.

No torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamoe.config.loading import layered_config, load_config
from megamoe.config.schema import Config
from megamoe.config.validation import validate_for_training
from megamoe.errors import ConfigError, MegamoeError
from megamoe.study.compute import paper_flops_per_token
from megamoe.study.schema import LadderModel, StudySettings
from megamoe.topology.flops import model_flops_per_token
from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table

# Keys in which the models of a study may differ; an ending dot stands for a whole section. All else is common.
MAY_DIFFER = (
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads",
    "model.num_query_groups", "model.head_dim", "moe.", "optimizer.lr", "optimizer.min_lr",
    "optimizer.expert_grad_scaling", "optimizer.expert_grad_world_size", "optimizer.expert_lr_scale", "parallel.",
    "run.micro_batch_size",
)  # fmt: skip
# What the study says itself.
_OWN = (
    "run.num_steps", "run.seed", "run.dir", "run.batch_size_ramp", "checkpoint.save_interval_steps",
    "checkpoint.keep_every_steps", "checkpoint.keep_last", "checkpoint.save_at_end", "checkpoint.resume",
    "checkpoint.load_from", "checkpoint.on_save_failure",
)  # fmt: skip
# Checkpoints are saved at a common measure of the steps that are evaluated: so many are no burden, nor are so many for
# each of those steps.
_MOST_SAVES, _MOST_SAVES_EACH = 64, 4
# What changes no number that a study compares.
_FREE = ("run.dir", "run.device", "monitor.", "watchdog.", "preflight.", "restart.", "checkpoint.", "data.tokenizer")


@dataclass(frozen=True)
class StudyRun:
    """One model trained with one seed. `eval_steps` are those of the checkpoints that are evaluated, ascending."""

    model: LadderModel
    seed: int
    config: Config
    eval_steps: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model.name}-seed{self.seed}"

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def tokens_per_step(self) -> int:
        return self.config.run.global_batch_size * self.config.model.seq_length

    @property
    def num_tokens(self) -> int:
        return self.config.run.num_steps * self.tokens_per_step

    @cached_property
    def num_parameters(self) -> int:
        return num_parameters(param_table(self.config.model, self.config.moe))

    @cached_property
    def num_active_parameters(self) -> int:
        return num_active_parameters(param_table(self.config.model, self.config.moe), self.config.moe)

    def paper_flops(self, tokens: int, vocab_size: int | None) -> float:
        return tokens * paper_flops_per_token(self.config, vocab_size=vocab_size)

    def model_flops(self, tokens: int) -> float:
        return tokens * model_flops_per_token(self.config)


def study_runs(study: StudySettings, where: str) -> tuple[StudyRun, ...]:
    """All runs, models in their order, the seeds of each together.

    Raises ConfigError where a model cannot be trained, where models differ in more than they may, and where the tokens
    are no whole steps.
    """
    runs: list[StudyRun] = []
    for place, model in enumerate(study.models):
        for seed in model.seeds if model.seeds is not None else study.seeds:
            runs.append(_run(study, where, f"models[{place}].settings of {where}", model, seed))
    _check_equal_rules(runs, study.may_differ)
    return tuple(runs)


def _run(study: StudySettings, where: str, said_in: str, model: LadderModel, seed: int) -> StudyRun:
    common = f"common of {where}"
    for tree, source in ((study.common, common), (model.settings, said_in)):
        if own := [key for key in flat(tree) if key in _OWN]:
            raise ConfigError(f"{own[0]} is set in {source}: it follows from the study, leave it out")
    if "preset" in model.settings:
        raise ConfigError(f"preset is set in {said_in}: put it into common, for models differ in a few keys alone")
    config = layered_config([(study.common, common), (model.settings, said_in)])
    batch = config.run.global_batch_size * config.model.seq_length
    steps = [_steps("num_tokens", study.num_tokens, batch, where)]
    for place, tokens in enumerate(study.evaluate_at_tokens or ()):
        steps.append(_steps(f"evaluate_at_tokens[{place}]", tokens, batch, where))
        if steps[-1] > steps[0]:
            raise ConfigError(
                f"evaluate_at_tokens[{place}] is {tokens} in {where}: training ends at {study.num_tokens}"
            )
    interval = math.gcd(*steps)
    if steps[0] // interval > max(_MOST_SAVES, _MOST_SAVES_EACH * len(steps)):
        raise ConfigError(
            f"evaluate_at_tokens and num_tokens of {where} have no larger measure than {interval * batch} tokens: "
            f"each run would keep {steps[0] // interval} checkpoints; use multiples of {_rounded(steps[0]) * batch}"
        )
    own = {
        "run": {"num_steps": steps[0], "seed": seed, "dir": str(study.folder / f"{model.name}-seed{seed}")},
        "checkpoint": {
            "save_interval_steps": interval, "keep_every_steps": interval, "keep_last": 1, "save_at_end": True,
            "resume": True, "on_save_failure": "stop",
        },
    }  # fmt: skip
    config = layered_config([(study.common, common), (model.settings, said_in), (own, where)])
    try:
        validate_for_training(config, study.local_ranks)
    except MegamoeError as error:
        raise type(error)(f"model {model.name} of {where}: {error}") from None
    return StudyRun(model, seed, config, tuple(sorted({*steps})))


def _rounded(num_steps: int) -> int:
    """Steps between checkpoints that fit into `num_steps` and are few enough."""
    return next(size for size in range(-(-num_steps // _MOST_SAVES), num_steps + 1) if num_steps % size == 0)


def _steps(key: str, tokens: int, batch: int, where: str) -> int:
    if tokens % batch:
        near = max(1, round(tokens / batch)) * batch
        raise ConfigError(f"{key} is {tokens} in {where}: it must be whole steps of {batch} tokens, as {near} is")
    return tokens // batch


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """section.key -> value. What is deeper stays one value."""
    return {
        f"{section}.{key}": value
        for section, group in tree.items()
        if isinstance(group, Mapping)
        for key, value in group.items()
    }


def differing_keys(one: Config, other: Config) -> list[str]:
    left, right = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return [key for key in left if left[key] != right[key]]


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key == pattern or (pattern.endswith(".") and key.startswith(pattern)) for pattern in patterns)


def _check_equal_rules(runs: list[StudyRun], more: tuple[str, ...]) -> None:
    """Everything but the shape of a model, its learning rate and its layout is the same."""
    known = flat(Config().model_dump(mode="json"))
    for key in more:
        if not any(matches(each, (key,)) for each in known):
            raise ConfigError(
                f'may_differ names "{key}", which is no key of a configuration: write one as model.init_std'
            )
    allowed = (*MAY_DIFFER, *more, *_OWN)
    first = runs[0]
    for run in runs[1:]:
        for key in differing_keys(first.config, run.config):
            if not matches(key, allowed):
                values = [flat(each.config.model_dump(mode="json"))[key] for each in (first, run)]
                raise ConfigError(
                    f"{key} is {values[0]} for {first.model.name} and {values[1]} for {run.model.name}: models of a "
                    "study are trained under equal rules; set it in common, or list it in may_differ"
                )


def check_trained_alike(run: StudyRun) -> None:
    """A folder that is there already must be this run's. Raises ConfigError naming the first key that is another."""
    record = run.dir / "config.yaml"
    if not record.exists():
        return
    trained = load_config(str(record))
    for key in differing_keys(trained, run.config):
        if not matches(key, _FREE):
            values = [flat(each.model_dump(mode="json"))[key] for each in (trained, run.config)]
            raise ConfigError(
                f"{run.dir} was trained with {key} {values[0]}, and the study says {values[1]}: choose another --out, "
                "or remove that folder"
            )
