"""Fewer experts: the busiest of each layer stay."""

from collections.abc import Sequence

from megamoe.config.schema import MoEConfig
from megamoe.errors import ConfigError
from megamoe.surgery.counts import counts_of, moe_counts, old_and_new, validated
from megamoe.surgery.loads import Loads, busiest_first, routing_groups, share_of_group
from megamoe.surgery.mixing import NewExpert, kept, mixed_targets, mixing_tree
from megamoe.surgery.recipes import Plan
from megamoe.surgery.sources import Sources, changed_config, changed_rules


def plan_prune(
    sources: Sources, num_experts: int | Sequence[int], loads: Loads, *, settings: Sequence[str] = ()
) -> Plan:
    """Keep the `num_experts` busiest experts of each MoE layer, or so many by layer, in their old order.

    loads: tokens of each expert by layer. With routing groups (moe.num_expert_groups) each group keeps equally many.
    Raises ConversionError for a dense model, ConfigError for more experts than there are or settings that do not fit.
    """
    counts = counts_of(num_experts)
    pairs = old_and_new(sources, counts)
    config = validated(changed_config(sources, settings, moe_counts(counts)))
    mixing, lost = {}, []
    for layer, (before, after) in pairs.items():
        if after > before:
            raise ConfigError(
                f"layer {layer} has {before} experts, fewer than the {after} to keep: use {before} or less"
            )
        stay = busiest(before, after, loads[layer], layer, config.moe.num_expert_groups)
        mixing[layer] = kept(stay)
        lost.append(1 - sum(loads[layer][expert] for expert in stay) / sum(loads[layer]))
    targets = mixed_targets(sources, config, mixing)
    notes = (f"experts that are gone had {max(lost):.1%} of the tokens in the layer that loses most",)
    is_same = all(before == after for before, after in pairs.values())
    preserves = "all of it" if is_same else _preserves(config.moe)
    changed = changed_rules(sources.config.moe, config.moe)
    preserves = "the experts that stay, under other rules" if changed else preserves
    return Plan("prune", {"mixing": mixing_tree(mixing)}, config, targets, preserves, notes + changed)


def _preserves(moe: MoEConfig) -> str:
    if moe.num_expert_groups is not None:
        return "the experts that stay; which groups and experts a token takes may change"
    if moe.normalize_gates or moe.gate_order == "select_then_softmax" or moe.score_function == "sigmoid":
        return "a layer's output for tokens whose experts there all stay, where no token is dropped"
    return "the experts that stay; gates grow, as the softmax is over fewer of them"


def busiest(before: int, after: int, loads: Sequence[float], layer: int, num_groups: int | None) -> list[int]:
    """The experts of a layer that stay, ascending: equally many, the busiest, of each routing group."""
    share = share_of_group(layer, after, num_groups)
    groups = routing_groups(before, num_groups)
    return sorted(expert for group in groups for expert in busiest_first(loads, group)[:share])


def pruned(before: int, after: int, loads: Sequence[float], layer: int, num_groups: int | None) -> list[NewExpert]:
    """`busiest` as new experts."""
    return kept(busiest(before, after, loads, layer, num_groups))
