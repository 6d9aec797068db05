"""A study's settings: STUDY.yaml, frozen and typed. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megamoe.config.loading import checked_settings, read_settings
from megamoe.config.schema import CountOrZero, PositiveInt, Section
from megamoe.errors import ConfigError
from megamoe.study.compute import PAPER_VOCAB_SIZE

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=60)]
Seeds = Annotated[tuple[CountOrZero, ...], Field(min_length=1)]
_RESERVED = re.compile(r"\.+|-*seed\d+")


class LadderModel(Section):
    """One model of a family: how it differs from what is common, and the seeds that it is trained with."""

    name: Word
    family: Word
    settings: Mapping[str, Any] = {}  # sections of a configuration: {model: {hidden_size: 128}, optimizer: {lr: 3e-3}}
    seeds: Seeds | None = None  # null: the study's


class EvaluationSettings(Section):
    """What every checkpoint is scored on. Experts drop no token then."""

    sets: str  # a file of `megamoe evaluate`
    settings: tuple[str, ...] = ()  # section.key=value, as run.micro_batch_size=16


class AnalysisSettings(Section):
    """How the families are compared."""

    baseline: Word = "dense"
    compared: Word = "moe"
    num_targets: Annotated[int, Field(ge=2, le=1000)] = 25  # losses at which the factor is told
    num_replicates: Annotated[int, Field(ge=0, le=100_000)] = 1_000  # of the bootstrap
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    seed: CountOrZero = 0
    text_noise: Literal["shared", "independent"] = "shared"  # see `megamoe.study.speedup`
    compute_vocab_size: PositiveInt | None = PAPER_VOCAB_SIZE  # of the paper's formula; null: the model's own


class StudySettings(Section):
    """A whole STUDY.yaml."""

    name: Word
    dir: str | None = None  # null: runs/NAME
    common: Mapping[str, Any] = {}  # of every model, as in a file for `megamoe train`: preset, model, optimizer, …
    num_tokens: PositiveInt  # that each model is trained on
    evaluate_at_tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None  # null: at the end
    seeds: Seeds = (1,)
    models: Annotated[tuple[LadderModel, ...], Field(min_length=1)]
    may_differ: tuple[str, ...] = ()  # more keys that models may set, besides those of `megamoe.study.ladder`
    evaluation: EvaluationSettings
    analysis: AnalysisSettings = AnalysisSettings()
    local_ranks: PositiveInt | None = None  # that train one model on this machine; null: one process

    @property
    def folder(self) -> Path:
        return Path(self.dir if self.dir is not None else f"runs/{self.name}")


def read_study(path: Path) -> StudySettings:
    """The settings of a YAML file. Raises ConfigError, one sentence: which key, where, what would be valid."""
    where = str(path)
    study = checked_settings(StudySettings, read_settings(path), where)
    if study.dir == "" or (study.dir is None and not study.name.strip(".")):
        key, value = ("dir", "") if study.dir == "" else ("name", study.name)
        raise ConfigError(f'{key} is "{value}" in {where}: name a folder of the study\'s own, as runs/{path.stem} is')
    names = [model.name for model in study.models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'two models of {where} are named "{name}": give each a name of its own')
    for place, model in enumerate(study.models):
        if _RESERVED.fullmatch(model.name):
            raise ConfigError(f'models[{place}].name is "{model.name}" in {where}: use a word, as in dense-1')
        for key, seeds in ((f"models[{place}].seeds", model.seeds), ("seeds", study.seeds)):
            if seeds is not None and len(set(seeds)) < len(seeds):
                raise ConfigError(f"{key} is {list(seeds)} in {where}: name each seed once")
    for key, family in (("baseline", study.analysis.baseline), ("compared", study.analysis.compared)):
        if family not in (families := sorted({model.family for model in study.models})):
            raise ConfigError(
                f'analysis.{key} is "{family}" in {where}, but no model is of that family: the families are '
                f"{', '.join(families)}"
            )
    if study.analysis.baseline == study.analysis.compared:
        family = study.analysis.compared
        raise ConfigError(f'analysis.compared is "{family}" in {where}, as baseline is: name another family')
    return study
