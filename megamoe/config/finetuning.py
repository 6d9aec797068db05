"""Checks of what a run is fine-tuned on, and how."""

from megamoe.config.schema import Config
from megamoe.errors import ConfigError


def check_finetune(config: Config) -> None:
    """Raises ConfigError where the section `finetune` and the model do not go together."""
    finetune, num_labels = config.finetune, config.model.num_labels
    if finetune.objective is None:
        if num_labels:
            raise ConfigError(
                f"model.num_labels {num_labels} makes a classifier, which only finetune.objective classification "
                "trains: set it, or use num_labels 0"
            )
        return
    if not finetune.train_files:
        raise ConfigError(
            "finetune.train_files is empty: name a JSON Lines file, as in finetune.train_files=[task/train.jsonl]"
        )
    if finetune.objective == "classification":
        _check_labels(config)
    elif num_labels:
        raise ConfigError(
            f"finetune.objective language_model needs a language model, but model.num_labels is {num_labels}: "
            "use num_labels 0"
        )
    _check_choice(config)
    if config.run.batch_size_ramp is not None:
        raise ConfigError("batch_size_ramp is for training on indexed datasets: use batch_size_ramp null")


def _check_labels(config: Config) -> None:
    labels, num_labels = config.finetune.labels, config.model.num_labels
    if num_labels < 2:
        raise ConfigError(
            f"finetune.objective classification needs two classes at least, but num_labels is {num_labels}: "
            "set model.num_labels"
        )
    if labels and len(labels) != num_labels:
        raise ConfigError(
            f"finetune.labels names {len(labels)} classes, but num_labels is {num_labels}: name each of them once"
        )
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f'finetune.labels names "{twice[0]}" twice: name each class once')
    if config.monitor.sample_prompt is not None:
        raise ConfigError("monitor.sample_prompt is continued by a language model: for a classifier use null")


def _check_choice(config: Config) -> None:
    finetune = config.finetune
    if finetune.best_by == "accuracy" and finetune.objective != "classification":
        raise ConfigError("finetune.best_by accuracy is for classification: use best_by loss")
    if finetune.stop_after_validations is not None and not finetune.valid_files:
        raise ConfigError("stop_after_validations needs finetune.valid_files, which is empty: name a file, or use null")
    if finetune.freeze and not config.moe.num_experts:
        absent = sorted({"routers", "experts"} & set(finetune.freeze))
        if absent:
            raise ConfigError(f"finetune.freeze names {absent[0]}, but num_experts is 0: leave {absent[0]} out")
