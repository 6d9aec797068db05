"""The keys of the configuration tree: which exist, what each accepts in words, and what an unknown one meant."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import annotated_types
from pydantic.fields import FieldInfo

from megamoe.config.schema import Config, Section
from megamoe.errors import ConfigError

# What users of Megatron-LM, DeepSpeed, Hugging Face, fairseq and the small stacks write for the same thing.
_ALIASES = {
    "model.num_layers": ("layers", "n_layer", "n_layers", "num_hidden_layers", "decoder_layers", "depth"),
    "model.hidden_size": ("hidden", "d_model", "n_embd", "dim", "hidden_dim", "decoder_embed_dim"),
    "model.ffn_hidden_size": ("ffn", "ffn_size", "ffn_dim", "intermediate_size", "decoder_ffn_embed_dim"),
    "model.num_attention_heads": ("heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "model.num_query_groups": ("kv_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads", "query_groups"),
    "model.head_dim": ("kv_channels", "head_size"),
    "model.vocab_size": ("vocab", "n_vocab", "padded_vocab_size"),
    "model.vocab_size_multiple": ("make_vocab_size_divisible_by", "vocab_multiple"),
    "model.seq_length": ("seq", "seq_len", "sequence_length", "max_position_embeddings", "block_size", "context_length",
                         "tokens_per_sample"),
    "model.normalization": ("norm", "norm_type"),
    "model.norm_epsilon": ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layernorm_epsilon"),
    "model.activation": ("act", "hidden_act", "activation_fn", "activation_function"),
    "model.position_embedding": ("position_embedding_type", "positions"),
    "model.rope_base": ("rope_theta", "rotary_base"),
    "model.qk_norm": ("qk_layernorm",),
    "model.use_bias": ("bias", "add_bias_linear", "disable_bias_linear"),
    "model.tie_embeddings": ("tied", "tie_word_embeddings", "untie_embeddings_and_output_weights",
                             "share_embeddings_and_output_weights", "share_decoder_input_output_embed"),
    "model.hidden_dropout": ("dropout", "resid_pdrop"),
    "model.attention_dropout": ("attn_dropout", "attn_pdrop"),
    "model.init_std": ("initializer_range", "init_method_std"),
    "moe.num_experts": ("experts", "n_experts", "num_local_experts", "moe_num_experts", "moe_expert_count"),
    "moe.top_k": ("k", "topk", "moe_top_k", "moe_router_topk", "router_topk", "num_experts_per_tok"),
    "moe.layer_pattern": ("moe_freq", "moe_layer_freq", "expert_interval", "decoder_sparse_step", "moe_layers"),
    "moe.expert_ffn_hidden_size": ("moe_ffn_hidden_size", "moe_intermediate_size", "expert_hidden_size"),
    "moe.shared_expert_ffn_hidden_size": ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    "moe.capacity_factor": ("capacity", "moe_capacity_factor", "moe_expert_capacity_factor"),
    "moe.recompute_activation": ("moe_act_recompute", "recompute_moe_act"),
    "moe.normalize_gates": ("norm_topk_prob", "normalize_gate", "renormalize"),
    "moe.balance_loss_coeff": ("aux_loss_coeff", "moe_aux_loss_coeff", "router_aux_loss_coef", "moe_loss_coeff",
                               "moe_gate_loss_wt"),
    "parallel.tensor_parallel_size": ("tp", "tp_size", "tensor", "tensor_parallel", "tensor_model_parallel_size"),
    "parallel.pipeline_parallel_size": ("pp", "pp_size", "pipeline", "pipeline_parallel",
                                        "pipeline_model_parallel_size"),
    "parallel.virtual_pipeline_parallel_size": ("vp", "vpp", "vpp_size", "virtual", "virtual_pipeline",
                                                "virtual_pipeline_model_parallel_size"),
    "parallel.expert_parallel_size": ("ep", "ep_size", "expert_parallel", "expert_model_parallel_size",
                                      "moe_expert_parallel_size"),
    "parallel.expert_tensor_parallel_size": ("etp", "etp_size", "expert_tensor_parallel"),
    "parallel.sequence_parallel": ("sp",),
    "parallel.all_to_all": ("a2a", "all2all", "alltoall", "use_2dh"),
    "parallel.all_to_all_chunks": ("a2a_chunks", "moe_overlap_degree", "a2a_ffn_overlap_degree"),
    "parallel.ranks_per_node": ("gpus_per_node", "nproc_per_node", "tasks_per_node"),
    "parallel.zero_stage": ("zero", "zero_optimization", "stage"),
    "parallel.recompute": ("activation_checkpointing", "checkpoint_activations", "gradient_checkpointing",
                           "recompute_granularity"),
    "parallel.timeout_seconds": ("timeout", "distributed_timeout", "distributed_timeout_minutes"),
    "optimizer.lr": ("learning_rate", "max_lr", "peak_lr"),
    "optimizer.min_lr": ("min_learning_rate", "end_lr"),
    "optimizer.schedule": ("lr_schedule", "lr_scheduler", "lr_scheduler_type", "scheduler", "lr_decay_style"),
    "optimizer.warmup_steps": ("warmup", "warmup_iters", "warmup_updates", "lr_warmup_steps", "lr_warmup_iters"),
    "optimizer.decay_steps": ("lr_decay_steps", "lr_decay_iters"),
    "optimizer.beta1": ("adam_beta1", "betas", "adam_betas"),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.clip_grad": ("grad_clip", "gradient_clipping", "max_grad_norm", "clip_norm", "clip_grad_norm"),
    "optimizer.expert_grad_scaling": ("moe_normalize_expert_grad",),
    "optimizer.initial_loss_scale": ("loss_scale", "fp16_init_scale", "initial_scale_power"),
    "data.train": ("train_data", "data_path", "train_data_path", "corpora", "dataset"),
    "data.valid": ("valid_data", "valid_data_path", "validation"),
    "checkpoint.save_interval_steps": ("save_interval", "save_steps", "save_every", "checkpoint_interval"),
    "checkpoint.keep_last": ("save_total_limit", "keep"),
    "checkpoint.keep_every_steps": ("keep_interval", "keep_interval_updates", "save_retain_interval"),
    "checkpoint.async_save": ("use_async_save", "async_checkpoint"),
    "checkpoint.load_from": ("finetune", "finetune_from_model", "pretrained_checkpoint", "init_from"),
    "watchdog.hang_timeout_seconds": ("hang_timeout", "heartbeat_timeout", "watchdog_timeout", "hang_seconds"),
    "monitor.log_interval_steps": ("log_interval", "logging_steps", "log_every"),
    "run.dir": ("output_dir", "save_dir", "run_dir", "out_dir"),
    "run.num_steps": ("steps", "max_steps", "train_iters", "train_steps", "max_update", "max_iters", "num_iterations"),
    "run.micro_batch_size": ("mbs", "batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    "run.global_batch_size": ("gbs", "train_batch_size"),
    "run.batch_size_ramp": ("rampup_batch_size", "batch_ramp"),
    "run.precision": ("dtype", "bf16", "fp16", "fp32", "torch_dtype", "params_dtype"),
    "run.eval_interval_steps": ("eval_interval", "eval_steps", "validate_interval_updates"),
    "run.num_eval_batches": ("eval_iters", "eval_batches"),
}  # fmt: skip


@cache
def _meaning_of_alias() -> Mapping[str, str]:
    return {alias: key for key, aliases in _ALIASES.items() for alias in aliases}


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key that holds a value, in the order of the schema; keys inside lists are left out."""

    def walk(section: type[Section], prefix: str) -> Iterable[str]:
        for name, field in section.model_fields.items():
            nested = section_of(field.annotation)
            if nested is not None:
                yield from walk(nested, f"{prefix}{name}.")
            if nested is None or not _is_section(field.annotation):
                yield f"{prefix}{name}"

    return tuple(walk(Config, ""))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also where null is allowed beside it; None for a plain value or a list."""
    choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((choice for choice in choices if _is_section(choice)), None)


def item_section_of(annotation: Any) -> type[Section] | None:
    """The section that each item of a list field is; None for anything else."""
    if typing.get_origin(annotation) is tuple:
        return section_of(typing.get_args(annotation)[0])
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def check_keys(
    tree: Any, where: str, section: type[Section] = Config, prefix: str = "", *, root: type[Section] = Config
) -> None:
    """Raise ConfigError for the first key of `tree` that the schema does not know, naming the nearest that it does.

    `where` is what holds the key, as the user knows it: a file, a preset, the command line. Values are not looked at.
    root: the whole schema, where that is not a run's.
    """
    if not isinstance(tree, Mapping):
        return
    for name, value in tree.items():
        key = f"{prefix}{name}"
        field = section.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            raise ConfigError(f'unknown key "{key}" in {where}: {_suggestion(str(name), section, prefix, root)}')
        nested, item = section_of(field.annotation), item_section_of(field.annotation)
        if nested is not None:
            check_keys(value, where, nested, f"{key}.", root=root)
        elif item is not None and isinstance(value, Sequence) and not isinstance(value, str):
            for index, element in enumerate(value):
                check_keys(element, where, item, f"{key}[{index}].", root=root)


def _suggestion(name: str, section: type[Section], prefix: str, root: type[Section]) -> str:
    """The end of the sentence about an unknown key: the nearest one, or all keys of its section."""
    plain = name.lower().replace("-", "_")
    nearest = _nearest(plain, section, prefix, root)
    if nearest is not None:
        return f'did you mean "{nearest}"?'
    keys = ", ".join(section.model_fields)
    if prefix:
        return f"{prefix.rstrip('.')} has {keys}"
    return f"the sections are {keys}" if root is Config else f"the keys are {keys}"


def _nearest(plain: str, section: type[Section], prefix: str, root: type[Section]) -> str | None:
    meant = _meaning_of_alias().get(plain) if root is Config else None
    if meant is not None:
        return meant
    in_section = difflib.get_close_matches(plain, section.model_fields, n=1, cutoff=0.65)
    if in_section:
        return prefix + in_section[0]
    if root is not Config:
        return None
    elsewhere: dict[str, str] = {}
    for key in all_keys():
        elsewhere.setdefault(key.rpartition(".")[2], key)
    found = difflib.get_close_matches(plain, elsewhere, n=1, cutoff=0.8)
    return elsewhere[found[0]] if found else None


def field_at(
    location: Sequence[str | int], root: type[Section] = Config
) -> tuple[str, Any, tuple[Any, ...], int]:
    """Follow `location` (names and list indices) into the schema `root` as far as it goes.

    Returns the dotted key, the annotation there, its bounds, and how many parts of `location` were used. Parts beyond
    are how pydantic names the branches of a union.
    """
    annotation: Any = root
    metadata: tuple[Any, ...] = ()
    key = ""
    for used, part in enumerate(location):
        section, item = section_of(annotation), item_section_of(annotation)
        if section is not None and part in section.model_fields:
            field = section.model_fields[str(part)]
            annotation, metadata = field.annotation, tuple(field.metadata)
            key = f"{key}.{part}" if key else str(part)
        elif item is not None and isinstance(part, int):
            annotation, metadata, key = item, (), f"{key}[{part}]"
        else:
            return key, annotation, metadata, used
    return key, annotation, metadata, len(location)


def accepted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a field accepts, in words that end a sentence: "a whole number of at least 1 or null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds: list[Any] = []
        for extra in arguments[1:]:
            bounds += extra.metadata if isinstance(extra, FieldInfo) else [extra]
        return accepted(arguments[0], bounds)
    if _is_union(annotation):
        # A list comes last: what its items are would else seem to go on.
        choices = sorted(arguments, key=lambda choice: typing.get_origin(choice) is tuple)
        return " or ".join(accepted(choice) for choice in choices)
    if origin is Literal:
        values = ", ".join(str(value) for value in arguments)
        return f"one of {values}" if len(arguments) > 1 else values
    if origin is tuple:
        count = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
        return f"{count}, each {accepted(arguments[0])}"
    if origin is Mapping:
        return "a group of settings"
    if _is_section(annotation):
        return f"a group of {', '.join(annotation.model_fields)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    limits = [text for bound in metadata if (text := _bound(bound))]
    return f"{words[annotation]} {' and '.join(limits)}" if limits else words[annotation]


@dataclass(frozen=True)
class InWords:
    """Stands in an Annotated type where its bounds are none that `accepted` can tell, as a pattern."""

    text: str  # follows the kind of the value


def _bound(bound: Any) -> str:
    if isinstance(bound, InWords):
        return bound.text
    for kind, attribute, words in (
        (annotated_types.Ge, "ge", "of at least"),
        (annotated_types.Gt, "gt", "above"),
        (annotated_types.Le, "le", "of at most"),
        (annotated_types.Lt, "lt", "below"),
    ):
        if isinstance(bound, kind):
            return f"{words} {getattr(bound, attribute):g}"
    return ""
