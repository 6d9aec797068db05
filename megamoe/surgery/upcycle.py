"""Dense -> mixture of experts: every expert begins as the dense FFN, or as a part of it.

Sources: Komatsuzaki et al. 2022, "Sparse Upcycling" (arXiv 2212.05055): copies, a fresh router. He et al. 2024,
"Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524): virtual groups and weight scaling.

    E experts   G parts of one FFN (granularity)   k choices   f hidden units of the dense FFN   d hidden size
    expert e = n * G + g is part g of copy n: units [g f/G, (g+1) f/G)

A virtual group is the G parts of one copy. Its router rows are equal, hence its scores: with k a multiple of G the k
best experts are k/G whole groups, and the sum over a group is the dense FFN. The gates of a token sum to S; fc2's
weights times G/S and its biases times 1/S make up for it. He et al. spread that factor over both matrices, by powers
that fit an activation; in fc2, which is linear, it is exact for every activation.
"""

from collections.abc import Sequence

from megamoe.checkpoint.slices import Box, whole_box
from megamoe.config.schema import Config, MoEConfig
from megamoe.config.validation import divisors
from megamoe.errors import ConfigError, ConversionError
from megamoe.surgery.counts import counts_of, moe_counts, validated
from megamoe.surgery.recipes import Draw, Noise, Plan, Region, Term, build_targets
from megamoe.surgery.sources import Sources, changed_config
from megamoe.topology.parameters import Parameter, dimensions, experts_by_layer, moe_layers


def plan_upcycle(
    sources: Sources,
    num_experts: int | Sequence[int],
    *,
    granularity: int = 1,
    noise: float = 0.0,
    seed: int = 1,
    settings: Sequence[str] = (),
) -> Plan:
    """Experts in the layers of `moe.layer_pattern`, `num_experts` in each, or so many by layer, lowest first.

    granularity: parts that each FFN is split into. noise: standard deviation of Gaussian noise on every expert, over
    the root mean square of what it is added to. settings: "moe.key=value" and "parallel.key=value" of the new model.
    Routers are drawn by the model's init rule under `seed`, which is not the draw that training would make.
    Raises ConversionError for a source that has experts already, ConfigError for what does not fit.
    """
    if sources.config.moe.num_experts:
        raise ConversionError(f"{sources.folders[0]} has experts already: upcycle starts from a dense model")
    dense = sources.config.model
    ffn = dimensions(dense, sources.config.moe).ffn
    if granularity < 1 or ffn % granularity:
        raise ConfigError(f"granularity {granularity} does not divide the FFN's {ffn} units: use one of {_few(ffn)}")
    check_noise(noise)
    counts = counts_of(num_experts)
    fixed = moe_counts(counts) | {"expert_ffn_hidden_size": ffn // granularity if granularity > 1 else None}
    config = validated(changed_config(sources, settings, fixed))
    _check_groups(config, granularity)
    arguments = {"granularity": granularity, "noise": noise, "seed": seed}

    def change(parameter: Parameter) -> list[Region] | None:
        if parameter.kind == "router":
            return _router(parameter, granularity, seed)
        return _experts(sources, config, parameter, granularity, noise, seed) if parameter.kind == "expert" else None

    targets = build_targets(sources, config, change)
    return Plan("upcycle", arguments, config, targets, _preserves(config, noise), _notes(config))


def check_noise(noise: float) -> None:
    """Raises ConfigError for a relative standard deviation below 0."""
    if not 0.0 <= noise < float("inf"):
        raise ConfigError(f"noise {noise} is no relative standard deviation: use 0 or more, such as 0.01")


def gate_sum(moe: MoEConfig, num_experts: int) -> tuple[float, bool]:
    """What the gates of a token sum to where none is dropped, and whether they do for every token.

    Where not, it is the sum for a router whose scores are all even, as those of a fresh one nearly are.
    """
    if moe.normalize_gates or moe.gate_order == "select_then_softmax":
        return moe.routed_scaling_factor, True
    if moe.score_function == "sigmoid":
        return moe.routed_scaling_factor * moe.top_k / 2, False
    return moe.routed_scaling_factor * moe.top_k / num_experts, moe.top_k == num_experts


def _router(parameter: Parameter, granularity: int, seed: int) -> list[Region]:
    """A row for each copy, drawn on its own; its parts have the same."""
    num_experts, hidden = parameter.shape
    return [
        Region(((e, e + 1), (0, hidden)), draw=Draw(parameter.init, seed, f"{parameter.name}/{e // granularity}"))
        for e in range(num_experts)
    ]


def _experts(
    sources: Sources, config: Config, parameter: Parameter, granularity: int, noise: float, seed: int
) -> list[Region]:
    ending = parameter.name.partition(".experts.")[2]
    entry = sources.parameter(f"layers.{parameter.layer}.ffn.{ending}")
    total, _ = gate_sum(config.moe, parameter.shape[0])
    factor = {"fc2.weight": granularity / total, "fc2.bias": 1 / total}.get(ending, 1.0)
    regions = []
    for e in range(parameter.shape[0]):
        box = _part(entry.shape, ending, e % granularity, granularity)
        own = Noise(noise, seed, f"{parameter.name}/{e}") if noise else None
        target = ((e, e + 1), *whole_box(parameter.shape[1:]))
        regions.append(Region(target, (Term(0, entry, box, factor),), own))
    return regions


def _part(shape: tuple[int, ...], ending: str, part: int, granularity: int) -> Box:
    """Hidden units of one part: of fc1 [.., f, d] and its bias [.., f], of fc2 [d, f]; fc2's bias [d] is whole."""
    box = list(whole_box(shape))
    axis = {"fc1.weight": -2, "fc1.bias": -1, "fc2.weight": -1}.get(ending)
    if axis is not None:
        units = shape[axis] // granularity
        box[axis] = (part * units, (part + 1) * units)
    return tuple(box)


def _check_groups(config: Config, granularity: int) -> None:
    """Whole virtual groups are chosen, and lie within the groups that a token's experts come from."""
    moe = config.moe
    if moe.shared_expert_ffn_hidden_size is not None:
        raise ConfigError("upcycle makes routed experts only: leave out moe.shared_expert_ffn_hidden_size")
    if moe.top_k % granularity:
        raise ConfigError(
            f"top_k {moe.top_k} is no multiple of granularity {granularity}: some parts of an FFN would be left out; "
            f"use top_k {granularity}, {2 * granularity}, …"
        )
    for layer, count in experts_by_layer(config.model, moe).items():
        size = count // (moe.num_expert_groups or 1)
        if count % granularity or size % granularity:
            what = f"the {size} experts of each group" if moe.num_expert_groups else f"the {count} experts"
            raise ConfigError(
                f"granularity {granularity} does not divide {what} of layer {layer}: use a multiple of it"
            )


def _preserves(config: Config, noise: float) -> str:
    counts = experts_by_layer(config.model, config.moe).values()
    if not all(gate_sum(config.moe, count)[1] for count in counts):
        text = (
            "near the dense model: the gates of a token do not sum to a constant, so that the output of the experts is "
            "the dense FFN's times (sum of the token's gates / that sum for an even router)"
        )
    else:
        text = "the dense model's function, where no token is dropped"
    return f"{text}; but for the noise" if noise else text


def _notes(config: Config) -> tuple[str, ...]:
    layers = ", ".join(str(layer) for layer in moe_layers(config.model, config.moe))
    notes = [f"experts in layers {layers}; routers are fresh"]
    if config.moe.balance_bias_update_rate:
        notes.append("balance biases begin at zero")
    return tuple(notes)


def _few(number: int) -> str:
    return ", ".join(str(n) for n in divisors(number)[:12])
