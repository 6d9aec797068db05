"""Checks across sections, all done before anything starts: what is impossible is named with what would be valid.

Messages use the last part of a key, as in `expert_parallel_size 8 does not divide num_experts 60`; these names are
unique in the tree. Types and bounds of single keys are the schema's.
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence

from megamoe.config.exchange import check_exchange, check_nodes
from megamoe.config.finetuning import check_finetune
from megamoe.config.guarding import check_guard
from megamoe.config.routing import check_router
from megamoe.config.schema import Config
from megamoe.config.structure import check_dense, check_structure, common_divisor_of_experts, expert_counts
from megamoe.config.support import check_supported
from megamoe.errors import ConfigError

_MAX_LISTED = 24


def validate(config: Config, world_size: int | None = None) -> None:
    """Check that the settings of `config` go together, on `world_size` ranks if that is known.

    Raises ConfigError with one sentence about the first thing that is impossible and what would be valid.
    """
    check_supported(config)
    _check_model(config)
    _check_experts(config)
    _check_layout(config)
    check_exchange(config)
    _check_optimizer(config)
    _check_data(config)
    _check_batch(config)
    check_guard(config)
    _check_restart(config)
    _check_watchdog(config)
    if world_size is not None:
        _check_world(config, world_size)


def validate_for_training(config: Config, world_size: int | None = None) -> None:
    """As `validate`, and there must be something to train on."""
    validate(config, world_size)
    check_finetune(config)
    if not config.data.train and config.finetune.objective is None:
        raise ConfigError("data.train is empty: name an indexed dataset, as in data.train=[{path: data/my_text}]")
    if config.monitor.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "monitor.tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, or "
            "set monitor.tensorboard false"
        )


def hang_timeout_seconds(config: Config) -> float:
    """The longest time without progress."""
    chosen = config.watchdog.hang_timeout_seconds
    return chosen if chosen is not None else config.parallel.timeout_seconds / 2


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _listed(values: Iterable[int]) -> str:
    """Values for a message; of very many the smallest, which are those that layouts use."""
    values = list(values)
    more = ", …" if len(values) > _MAX_LISTED else ""
    return ", ".join(str(value) for value in values[:_MAX_LISTED]) + more


def _require_divides(key: str, value: int, other: str, number: int, valid: Iterable[int] | None = None) -> None:
    if number % value:
        choices = _listed(divisors(number) if valid is None else valid)
        raise ConfigError(f"{key} {value} does not divide {other} {number}: use {choices}")


def _ffn_size(config: Config) -> int:
    return config.model.ffn_hidden_size or 4 * config.model.hidden_size


def _expert_ffn_size(config: Config) -> int:
    return config.moe.expert_ffn_hidden_size or _ffn_size(config)


def _padded_vocab_size(config: Config) -> int:
    multiple = config.model.vocab_size_multiple
    return math.ceil(config.model.vocab_size / multiple) * multiple


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_dim is None:
        _require_divides("num_attention_heads", model.num_attention_heads, "hidden_size", model.hidden_size)
    if model.num_query_groups is not None:
        heads = model.num_attention_heads
        _require_divides("num_query_groups", model.num_query_groups, "num_attention_heads", heads)
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    if model.position_embedding == "rope" and head_dim % 2:
        raise ConfigError(
            f"position_embedding rope turns pairs of values, but head_dim is {head_dim}: use an even head_dim"
        )
    if model.position_embedding == "sinusoidal" and (model.hidden_size % 2 or model.hidden_size < 4):
        raise ConfigError(
            "position_embedding sinusoidal is half sines and half cosines, but hidden_size is "
            f"{model.hidden_size}: use an even hidden_size of at least 4"
        )


def _check_experts(config: Config) -> None:
    moe, parallel, num_layers = config.moe, config.parallel, config.model.num_layers
    if moe.num_experts == 0:
        for key in ("expert_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, key) > 1:
                raise ConfigError(f"{key} {getattr(parallel, key)} needs experts, but num_experts is 0: use {key} 1")
        check_dense(moe)
        return
    _check_pattern(moe.layer_pattern, num_layers)
    check_structure(config)
    for name, count in expert_counts(moe).items():
        if moe.top_k > count:
            fewest = min(expert_counts(moe).values())
            raise ConfigError(f"top_k {moe.top_k} is more than {name} {count}: use 1 to {fewest}")
    if moe.top_k == 1 and moe.normalize_gates:
        raise ConfigError(
            "top_k 1 with normalize_gates true makes every gate 1, so that the router never learns from the language "
            "loss: use normalize_gates false"
        )
    if moe.eval_capacity_factor is not None and moe.eval_capacity_fraction is not None:
        raise ConfigError("eval_capacity_factor and eval_capacity_fraction are both set: use one of them")
    check_router(moe)


def _check_pattern(pattern: int | Sequence[int], num_layers: int) -> None:
    if isinstance(pattern, int):
        if pattern > num_layers:
            raise ConfigError(
                f"layer_pattern {pattern} puts experts in none of the {num_layers} layers: "
                f"use 1 to {num_layers}, or a list of layers"
            )
        return
    if not pattern:
        raise ConfigError("layer_pattern [] puts experts in no layer: list at least one, or set num_experts 0")
    for layer in pattern:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"layer_pattern names layer {layer}, but num_layers is {num_layers}: use layers 0 to {num_layers - 1}"
            )
        if pattern.count(layer) > 1:
            raise ConfigError(f"layer_pattern names layer {layer} twice: list each layer once")


def _has_dense_layers(config: Config) -> bool:
    pattern = config.moe.layer_pattern
    if config.moe.num_experts == 0:
        return True
    return pattern > 1 if isinstance(pattern, int) else len(pattern) < config.model.num_layers


def _cut_by_tensor(config: Config) -> Mapping[str, int]:
    """What tensor parallelism must divide, by the name that a message gives it."""
    model = config.model
    sizes = {"num_attention_heads": model.num_attention_heads}
    if model.num_query_groups is not None:
        sizes["num_query_groups"] = model.num_query_groups
    if _has_dense_layers(config):
        sizes["ffn_hidden_size"] = _ffn_size(config)
    if config.moe.shared_expert_ffn_hidden_size is not None:
        sizes["shared_expert_ffn_hidden_size"] = config.moe.shared_expert_ffn_hidden_size
    sizes["the padded vocabulary"] = _padded_vocab_size(config)
    if config.parallel.sequence_parallel or config.moe.num_experts:
        # With experts each tensor rank routes its own part of the sequence, so that no token is computed twice.
        sizes["seq_length"] = model.seq_length
    return sizes


def _check_layout(config: Config) -> None:
    parallel = config.parallel
    tensor, expert_tensor = parallel.tensor_parallel_size, parallel.expert_tensor_parallel_size
    cut = _cut_by_tensor(config)
    for name, size in cut.items():
        _require_divides("tensor_parallel_size", tensor, name, size, divisors(math.gcd(*cut.values())))
    if parallel.sequence_parallel and tensor == 1:
        raise ConfigError(
            "sequence_parallel needs tensor_parallel_size above 1: use sequence_parallel false, or "
            f"tensor_parallel_size {_listed(divisors(math.gcd(*cut.values()))[1:])}"
        )
    if expert_tensor not in (1, tensor):
        raise ConfigError(
            f"expert_tensor_parallel_size {expert_tensor} is neither 1 nor tensor_parallel_size {tensor}: "
            f"use {' or '.join(str(size) for size in sorted({1, tensor}))}"
        )
    if config.moe.num_experts:
        valid = divisors(common_divisor_of_experts(config.moe))
        for name, count in expert_counts(config.moe).items():
            _require_divides("expert_parallel_size", parallel.expert_parallel_size, name, count, valid)
        size = _expert_ffn_size(config)
        _require_divides("expert_tensor_parallel_size", expert_tensor, "expert_ffn_hidden_size", size, [1])
    _check_stages(config)


def _check_stages(config: Config) -> None:
    stages, chunks = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    num_layers = config.model.num_layers
    _require_divides("pipeline_parallel_size", stages, "num_layers", num_layers)
    if chunks > 1 and stages == 1:
        raise ConfigError(
            f"virtual_pipeline_parallel_size {chunks} needs pipeline_parallel_size above 1: "
            "use virtual_pipeline_parallel_size 1"
        )
    _require_divides(
        "virtual_pipeline_parallel_size",
        chunks,
        f"the layers of each of {stages} pipeline stages,",
        num_layers // stages,
    )


def _check_optimizer(config: Config) -> None:
    optimizer, num_steps = config.optimizer, config.run.num_steps
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(f"min_lr {optimizer.min_lr:g} is above lr {optimizer.lr:g}: use 0 to {optimizer.lr:g}")
    if optimizer.implementation == "apex" and optimizer.name != "adamw":
        raise ConfigError(
            f"implementation apex has no {optimizer.name}: use implementation auto or torch, or name adamw"
        )
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        raise ConfigError(
            f"min_loss_scale {optimizer.min_loss_scale:g} is above initial_loss_scale "
            f"{optimizer.initial_loss_scale:g}: use at most {optimizer.initial_loss_scale:g}"
        )
    if optimizer.decay_steps is not None and optimizer.schedule not in ("linear", "cosine"):
        other = "wsd_decay_steps" if optimizer.schedule == "wsd" else "schedule linear or cosine"
        raise ConfigError(
            f"decay_steps means nothing to schedule {optimizer.schedule}: use {other}, or decay_steps null"
        )
    if optimizer.wsd_decay_steps is not None and optimizer.schedule != "wsd":
        raise ConfigError(
            f"wsd_decay_steps means nothing to schedule {optimizer.schedule}: use schedule wsd, or wsd_decay_steps null"
        )
    end_key, end = ("num_steps", num_steps) if optimizer.decay_steps is None else ("decay_steps", optimizer.decay_steps)
    if optimizer.warmup_steps >= end:
        raise ConfigError(f"warmup_steps {optimizer.warmup_steps} is not below {end_key} {end}: use 0 to {end - 1}")
    if optimizer.schedule == "wsd" and optimizer.wsd_decay_steps is not None:
        room = num_steps - optimizer.warmup_steps
        if optimizer.wsd_decay_steps > room:
            raise ConfigError(
                f"wsd_decay_steps {optimizer.wsd_decay_steps} and warmup_steps {optimizer.warmup_steps} are more than "
                f"num_steps {num_steps}: use wsd_decay_steps 1 to {room}"
            )


def _check_data(config: Config) -> None:
    data = config.data
    if data.split[0] == 0:
        raise ConfigError("data.split leaves nothing to train on: give its first share a value above 0")
    if data.tokenizer.kind != "byte" and data.tokenizer.path is None:
        wanted = (
            "a .model file" if data.tokenizer.kind == "sentencepiece" else "a folder with vocab.json and merges.txt"
        )
        raise ConfigError(f"data.tokenizer.kind {data.tokenizer.kind} needs data.tokenizer.path: give {wanted}")


def _batch_sizes(config: Config) -> Mapping[str, int]:
    """Every size that a global batch can take is made of these, by the name that a message gives them."""
    sizes = {"global_batch_size": config.run.global_batch_size}
    ramp = config.run.batch_size_ramp
    if ramp is not None:
        sizes |= {"batch_size_ramp.start": ramp.start, "batch_size_ramp.increment": ramp.increment}
    return sizes


def _require_multiple(key: str, value: int, unit: int, unit_words: str) -> None:
    if value % unit:
        below = value // unit * unit
        choices = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(f"{key} {value} is not a multiple of {unit_words}: use {choices}")


def _check_batch(config: Config) -> None:
    run = config.run
    for key, size in _batch_sizes(config).items():
        _require_multiple(key, size, run.micro_batch_size, f"micro_batch_size {run.micro_batch_size}")
    ramp = run.batch_size_ramp
    if ramp is None:
        return
    if ramp.start > run.global_batch_size:
        raise ConfigError(
            f"batch_size_ramp.start {ramp.start} is above global_batch_size {run.global_batch_size}: "
            f"use at most {run.global_batch_size}"
        )
    growth = run.global_batch_size - ramp.start
    if growth % ramp.increment:
        valid = [size for size in divisors(growth) if size % run.micro_batch_size == 0]
        raise ConfigError(
            f"batch_size_ramp.increment {ramp.increment} does not lead from batch_size_ramp.start {ramp.start} to "
            f"global_batch_size {run.global_batch_size}: use {_listed(valid)}"
        )


def _check_restart(config: Config) -> None:
    restart = config.restart
    if restart.max_attempts_without_progress > restart.max_attempts:
        raise ConfigError(
            f"max_attempts_without_progress {restart.max_attempts_without_progress} is above max_attempts "
            f"{restart.max_attempts}: use 1 to {restart.max_attempts}"
        )


def _check_watchdog(config: Config) -> None:
    """A collective that times out says less than the watchdog: who did not come."""
    chosen, collective = config.watchdog.hang_timeout_seconds, config.parallel.timeout_seconds
    if config.watchdog.enabled and chosen is not None and chosen >= collective:
        raise ConfigError(
            f"hang_timeout_seconds {chosen:g} is not below parallel.timeout_seconds {collective:g}: use less, or null "
            "for half of it"
        )


def _check_world(config: Config, world_size: int) -> None:
    """What must fit the number of ranks: the fold of ranks first, then the batch over data ranks and stages."""
    parallel, run = config.parallel, config.run
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    model_ranks = tensor * stages
    if world_size < 1 or world_size % model_ranks:
        ranks = f"{world_size} rank is" if world_size == 1 else f"{world_size} ranks are"
        raise ConfigError(
            f"{ranks} not a multiple of tensor_parallel_size {tensor} x pipeline_parallel_size {stages} "
            f"= {model_ranks}: use {model_ranks}, {2 * model_ranks}, {3 * model_ranks}, … ranks"
        )
    stage_ranks = world_size // stages
    expert, expert_tensor = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    if stage_ranks % (expert * expert_tensor):
        places = stage_ranks // math.gcd(stage_ranks, expert_tensor)
        valid = divisors(math.gcd(places, common_divisor_of_experts(config.moe)) if config.moe.num_experts else 1)
        raise ConfigError(
            f"expert_parallel_size {expert} x expert_tensor_parallel_size {expert_tensor} does not divide the "
            f"{stage_ranks} ranks of a pipeline stage: use expert_parallel_size {_listed(valid)}"
        )
    check_nodes(parallel, world_size)
    data = stage_ranks // tensor
    unit = run.micro_batch_size * data
    words = f"micro_batch_size {run.micro_batch_size} x data parallel size {data} = {unit}"
    if parallel.virtual_pipeline_parallel_size > 1:
        # The interleaved schedule hands micro-batches to a chunk in groups of the pipeline's size.
        unit *= stages
        words = (
            f"micro_batch_size {run.micro_batch_size} x data parallel size {data} x pipeline_parallel_size {stages} "
            f"= {unit}, as virtual_pipeline_parallel_size above 1 needs"
        )
    for key, size in _batch_sizes(config).items():
        _require_multiple(key, size, unit, words)
