"""The parameter table: every tensor of the model, once, by global name and global shape. No torch.

The real model is checked against it, checkpoints and converters address tensors by it, the planner adds it up.

    d hidden   f ffn   nh heads   ng query groups   hd head dim   V padded vocabulary   E experts   f_e expert ffn
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megamoe.config.schema import ModelConfig, MoEConfig
from megamoe.errors import ConfigError, TopologyError
from megamoe.topology.grid import Coordinates, Grid
from megamoe.topology.initial import Constant, Initial, InitRule, Normal, Uniform, init_rule, seed_of

__all__ = [
    "HEAD",
    "Constant",
    "Dimensions",
    "Normal",
    "Parameter",
    "Uniform",
    "dimensions",
    "experts_by_layer",
    "is_output_tied",
    "local_shape",
    "local_slices",
    "moe_layers",
    "num_active_parameters",
    "num_parameters",
    "padded_vocab_size",
    "param_table",
    "seed_of",
]

HEAD = "score.weight"  # of a classifier
Kind = Literal["embedding", "norm", "attention", "ffn", "router", "expert", "mix", "output", "head"]


@dataclass(frozen=True)
class Parameter:
    """One tensor of the whole model, before any rank takes its part."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None  # 0-based; None: embedding, final norm, output, head of a classifier
    tensor_dim: int | None  # cut by tensor parallelism (experts: by expert tensor parallelism)
    expert_dim: int | None  # numbers the experts; cut by expert parallelism
    init: Initial
    is_bias_or_norm: bool  # what optimizer.decay_norms_and_biases is about

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Dimensions:
    """The sizes a model is made of, with every `None` of the configuration resolved."""

    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_dim: int
    vocab: int
    expert_ffn: int
    shared_expert_ffn: int | None


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding: vocab_size rounded up to a multiple of vocab_size_multiple, whatever the layout."""
    return math.ceil(model.vocab_size / model.vocab_size_multiple) * model.vocab_size_multiple


def dimensions(model: ModelConfig, moe: MoEConfig) -> Dimensions:
    """Resolve the sizes. Raises ConfigError where heads do not divide what they must."""
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    if heads % groups:
        raise ConfigError(
            f"model.num_query_groups {groups} does not divide model.num_attention_heads {heads}: "
            f"use one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise ConfigError(
            f"model.num_attention_heads {heads} does not divide model.hidden_size {model.hidden_size}: "
            "set model.head_dim or another number of heads"
        )
    ffn = model.ffn_hidden_size or 4 * model.hidden_size
    return Dimensions(
        hidden=model.hidden_size,
        ffn=ffn,
        heads=heads,
        query_groups=groups,
        head_dim=model.head_dim or model.hidden_size // heads,
        vocab=padded_vocab_size(model),
        expert_ffn=moe.expert_ffn_hidden_size or ffn,
        shared_expert_ffn=moe.shared_expert_ffn_hidden_size,
    )


def moe_layers(model: ModelConfig, moe: MoEConfig) -> tuple[int, ...]:
    """The 0-based layers that hold experts, ascending. Raises ConfigError for a layer the model does not have."""
    if moe.num_experts == 0:
        return ()
    if isinstance(moe.layer_pattern, int):
        return tuple(i for i in range(model.num_layers) if (i + 1) % moe.layer_pattern == 0)
    absent = sorted(i for i in set(moe.layer_pattern) if not 0 <= i < model.num_layers)
    if absent:
        raise ConfigError(
            f"moe.layer_pattern names layer {absent[0]}, but model.num_layers is {model.num_layers}: "
            f"use layers 0 to {model.num_layers - 1}"
        )
    return tuple(sorted(set(moe.layer_pattern)))


def experts_by_layer(model: ModelConfig, moe: MoEConfig) -> dict[int, int]:
    """0-based MoE layer -> its number of experts, ascending by layer.

    Raises ConfigError as `moe_layers` does, and where num_experts_by_layer does not name each MoE layer once.
    """
    layers, counts = moe_layers(model, moe), moe.num_experts_by_layer
    if counts is None:
        return dict.fromkeys(layers, moe.num_experts)
    if len(counts) != len(layers):
        raise ConfigError(
            f"moe.num_experts_by_layer has {len(counts)} entries, but {len(layers)} layers hold experts: "
            "give one for each of them"
        )
    return dict(zip(layers, counts, strict=True))


def param_table(model: ModelConfig, moe: MoEConfig) -> tuple[Parameter, ...]:
    """Every parameter of the model in model order; the experts of a layer are stacked in one entry each.

    Positions (sinusoidal, rotary) have no parameters. Raises ConfigError as `dimensions` and `moe_layers` do.
    """
    sizes, rule = dimensions(model, moe), init_rule(model)
    num_experts = experts_by_layer(model, moe)
    table = [
        Parameter("embedding.weight", (sizes.vocab, sizes.hidden), "embedding", None, 0, None, rule.embedding(), False)
    ]
    for layer in range(model.num_layers):
        table += _norm(f"layers.{layer}.attention_norm", sizes.hidden, layer, bias=model.normalization == "layernorm")
        table += _attention(model, sizes, rule, layer)
        table += _norm(f"layers.{layer}.ffn_norm", sizes.hidden, layer, bias=model.normalization == "layernorm")
        if layer in num_experts:
            table += _experts(model, sizes, rule, layer, num_experts[layer])
            table += _shared_expert(model, moe, sizes, rule, layer)
        else:
            table += _ffn(model, sizes, rule, layer)
    table += _norm("final_norm", sizes.hidden, None, bias=model.normalization == "layernorm")
    if model.num_labels:  # named as Hugging Face's classifiers name it; no bias, as there; whole on each tensor rank
        shape, init = (model.num_labels, sizes.hidden), rule.linear_weight(sizes.hidden)
        table.append(Parameter(HEAD, shape, "head", None, None, None, init, False))
    elif not model.tie_embeddings:
        table.append(
            Parameter("output.weight", (sizes.vocab, sizes.hidden), "output", None, 0, None, rule.embedding(), False)
        )
    return tuple(table)


def is_output_tied(model: ModelConfig) -> bool:
    """Whether the embedding is the output matrix, too: on the last pipeline stage there is then a copy of it."""
    return model.tie_embeddings and not model.num_labels


def num_parameters(table: Iterable[Parameter]) -> int:
    """Elements of the whole model."""
    return sum(parameter.num_elements for parameter in table)


def num_active_parameters(table: Iterable[Parameter], moe: MoEConfig) -> int:
    """Elements one token passes: everything but the routed experts, and top_k of those in each MoE layer."""
    total = 0
    for parameter in table:
        if parameter.expert_dim is None:
            total += parameter.num_elements
        else:
            num_experts = parameter.shape[parameter.expert_dim]
            total += parameter.num_elements // num_experts * min(moe.top_k, num_experts)
    return total


def local_shape(parameter: Parameter, grid: Grid) -> tuple[int, ...]:
    """Shape of one rank's part, the same on every rank that holds the layer.

    Raises TopologyError where a cut dimension does not divide.
    """
    shape = list(parameter.shape)
    for dim, parts, key in _cuts(parameter, grid):
        if shape[dim] % parts:
            raise TopologyError(
                f"dimension {dim} of {parameter.name} has size {parameter.shape[dim]}, which parallel.{key} {parts} "
                f"does not divide: use one of {', '.join(str(n) for n in _divisors(parameter.shape[dim], limit=parts))}"
            )
        shape[dim] //= parts
    return tuple(shape)


def local_slices(parameter: Parameter, grid: Grid, coordinates: Coordinates) -> tuple[slice, ...]:
    """Where the part of the rank at `coordinates` lies in the global tensor: one slice for each dimension.

    Says nothing of pipeline stages: `megamoe.topology.stages` knows which ranks hold the layer at all.
    Raises TopologyError as `local_shape` does.
    """
    local = local_shape(parameter, grid)
    starts = [0] * len(local)
    if parameter.expert_dim is not None:
        starts[parameter.expert_dim] = coordinates.expert * local[parameter.expert_dim]
    if parameter.tensor_dim is not None:
        part = coordinates.expert_tensor if parameter.kind == "expert" else coordinates.tensor
        starts[parameter.tensor_dim] = part * local[parameter.tensor_dim]
    return tuple(slice(start, start + size) for start, size in zip(starts, local, strict=True))


def _cuts(parameter: Parameter, grid: Grid) -> Iterator[tuple[int, int, str]]:
    """(dimension, number of parts, configuration key) of each cut."""
    if parameter.expert_dim is not None:
        yield parameter.expert_dim, grid.expert, "expert_parallel_size"
    if parameter.tensor_dim is not None and parameter.kind == "expert":
        yield parameter.tensor_dim, grid.expert_tensor, "expert_tensor_parallel_size"
    elif parameter.tensor_dim is not None:
        yield parameter.tensor_dim, grid.tensor, "tensor_parallel_size"


def _divisors(number: int, *, limit: int) -> list[int]:
    """Divisors of `number` up to twice `limit`: enough to choose from, few enough to read."""
    return [n for n in range(1, min(number, 2 * limit) + 1) if number % n == 0]


def _norm(name: str, size: int, layer: int | None, *, bias: bool, tensor_dim: int | None = None) -> list[Parameter]:
    parameters = [Parameter(f"{name}.weight", (size,), "norm", layer, tensor_dim, None, Constant(1.0), True)]
    if bias:
        parameters.append(Parameter(f"{name}.bias", (size,), "norm", layer, tensor_dim, None, Constant(0.0), True))
    return parameters


def _attention(model: ModelConfig, sizes: Dimensions, rule: InitRule, layer: int) -> list[Parameter]:
    """Fused rows in Megatron's order: for each query group its query heads, then one key and one value head."""
    name, d = f"layers.{layer}.attention", sizes.hidden
    queries, keys = sizes.heads * sizes.head_dim, sizes.query_groups * sizes.head_dim

    def entry(ending: str, shape: tuple[int, ...], tensor_dim: int | None, init: Initial) -> Parameter:
        return Parameter(f"{name}.{ending}", shape, "attention", layer, tensor_dim, None, init, ending.endswith("bias"))

    parameters = [entry("qkv.weight", (queries + 2 * keys, d), 0, rule.qkv_weight(d, queries))]
    if model.use_bias:
        parameters.append(entry("qkv.bias", (queries + 2 * keys,), 0, rule.linear_bias(d)))
    if model.qk_norm == "head":  # one norm for all heads: nothing to cut
        parameters += _norm(f"{name}.q_norm", sizes.head_dim, layer, bias=False)
        parameters += _norm(f"{name}.k_norm", sizes.head_dim, layer, bias=False)
    elif model.qk_norm == "full":
        parameters += _norm(f"{name}.q_norm", queries, layer, bias=False, tensor_dim=0)
        parameters += _norm(f"{name}.k_norm", keys, layer, bias=False, tensor_dim=0)
    parameters.append(entry("out.weight", (d, queries), 1, rule.attention_out_weight(queries, d)))
    if model.use_bias:
        # Added once, after the sum over tensor ranks, hence whole on each of them. Starts at zero under every rule.
        parameters.append(entry("out.bias", (d,), None, Constant(0.0)))
    return parameters


def _two_linears(
    name: str, kind: Kind, layer: int, stack: tuple[int, ...], ffn: int, model: ModelConfig, rule: InitRule
) -> list[Parameter]:
    """fc1 and fc2 of a dense FFN (`stack` is ()) or of stacked experts (`stack` is (E,)).

    SwiGLU holds the gate (index 0) and the linear half (1) in a dimension of their own, so that a tensor cut takes the
    same columns of both.
    """
    d, halves = model.hidden_size, (2,) if model.activation == "swiglu" else ()
    expert_dim = 0 if stack else None
    fc1_dim = len(stack) + len(halves)

    def entry(ending: str, shape: tuple[int, ...], tensor_dim: int | None, init: Initial) -> Parameter:
        bias = ending.endswith("bias")
        return Parameter(f"{name}.{ending}", stack + shape, kind, layer, tensor_dim, expert_dim, init, bias)

    fc1 = [entry("fc1.weight", (*halves, ffn, d), fc1_dim, rule.linear_weight(d))]
    fc2 = [entry("fc2.weight", (d, ffn), len(stack) + 1, rule.residual_weight(ffn))]
    if model.use_bias:
        fc1.append(entry("fc1.bias", (*halves, ffn), fc1_dim, rule.linear_bias(d)))
        fc2.append(entry("fc2.bias", (d,), None, rule.linear_bias(ffn)))
    return fc1 + fc2


def _ffn(model: ModelConfig, sizes: Dimensions, rule: InitRule, layer: int) -> list[Parameter]:
    return _two_linears(f"layers.{layer}.ffn", "ffn", layer, (), sizes.ffn, model, rule)


def _experts(model: ModelConfig, sizes: Dimensions, rule: InitRule, layer: int, num_experts: int) -> list[Parameter]:
    """The router (never a bias, never cut) and the stacked experts of one layer."""
    shape, init = (num_experts, sizes.hidden), rule.linear_weight(sizes.hidden)
    router = Parameter(f"layers.{layer}.router.weight", shape, "router", layer, None, None, init, False)
    name = f"layers.{layer}.experts"
    return [router, *_two_linears(name, "expert", layer, (num_experts,), sizes.expert_ffn, model, rule)]


def _shared_expert(
    model: ModelConfig, moe: MoEConfig, sizes: Dimensions, rule: InitRule, layer: int
) -> list[Parameter]:
    """A dense FFN in all but name, and what weighs it against the experts: one row, or two with a bias; never cut."""
    if sizes.shared_expert_ffn is None:
        return []
    parameters = _two_linears(f"layers.{layer}.shared_expert", "ffn", layer, (), sizes.shared_expert_ffn, model, rule)
    name, d = f"layers.{layer}.shared_expert_mix", sizes.hidden
    rows = {"add": 0, "sigmoid_gate": 1, "residual": 2}[moe.shared_expert_mix]
    if rows:
        weight = rule.linear_weight(d)
        parameters.append(Parameter(f"{name}.weight", (rows, d), "mix", layer, None, None, weight, False))
    if moe.shared_expert_mix == "residual":
        parameters.append(Parameter(f"{name}.bias", (rows,), "mix", layer, None, None, rule.linear_bias(d), True))
    return parameters
