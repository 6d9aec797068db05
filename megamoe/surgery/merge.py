"""Fewer experts: alike ones become their average.

Source: Li et al. 2023, "Merge, Then Compress" (M-SMoE, arXiv 2310.01334): averages weighted by how often each expert is
used. There hidden units are matched by permutation first; here they are not, which suits experts that grew from one
FFN (upcycled, resized) and no others as well.
"""

from collections.abc import Mapping, Sequence

from megamoe.errors import ConfigError
from megamoe.surgery.counts import counts_of, moe_counts, old_and_new, old_counts, validated
from megamoe.surgery.loads import Loads, routing_groups, share_of_group
from megamoe.surgery.mixing import NewExpert, mixed_targets, mixing_tree
from megamoe.surgery.recipes import Plan
from megamoe.surgery.similarity import By, clusters, cosines
from megamoe.surgery.sources import Sources, changed_config, changed_rules

Groups = Mapping[int, Sequence[Sequence[int]]]  # MoE layer -> the old experts of each new one
_PRESERVES = "a function near the old one where merged experts were alike"


def plan_merge(sources: Sources, groups: Groups, *, loads: Loads | None = None, settings: Sequence[str] = ()) -> Plan:
    """Each group of a layer becomes one expert, in the order given; a group of one stays as it is.

    Matrices, biases, router rows and balance biases are averaged, weighted by `loads` (tokens of each expert by layer)
    or evenly. Raises ConversionError for a dense model, ConfigError for groups that do not hold each expert once.
    """
    old = old_counts(sources)
    if set(groups) != set(old):
        raise ConfigError(f"groups are given for layers {sorted(groups)}, but layers with experts are {list(old)}")
    for layer, count in old.items():
        _check_groups(groups[layer], count, layer, sources.config.moe.num_expert_groups)
    counts = tuple(len(groups[layer]) for layer in old)
    config = validated(changed_config(sources, settings, moe_counts(counts)))
    mixing = {
        layer: [merged(group, None if loads is None else loads[layer]) for group in groups[layer]] for layer in old
    }
    targets = mixed_targets(sources, config, mixing)
    weighted = "by load" if loads is not None else "evenly"
    notes = (
        f"averages are weighted {weighted}; hidden units are not matched",
        *changed_rules(sources.config.moe, config.moe),
    )
    return Plan("merge", {"mixing": mixing_tree(mixing)}, config, targets, _PRESERVES, notes)


def alike_groups(sources: Sources, num_experts: int | Sequence[int], by: By = "router") -> dict[int, list[list[int]]]:
    """Groups for `plan_merge`: `num_experts` of them in each layer, or so many by layer, of alike experts.

    With routing groups (moe.num_expert_groups) experts are grouped within each. Raises as `plan_merge`.
    """
    pairs = old_and_new(sources, counts_of(num_experts))
    found = {}
    for layer, (before, after) in pairs.items():
        if after > before:
            raise ConfigError(f"layer {layer} has {before} experts, which cannot be merged to {after}: use less")
        found[layer] = alike(sources, layer, before, after, by)
    return found


def alike(sources: Sources, layer: int, before: int, after: int, by: By) -> list[list[int]]:
    """`after` groups of the alike among the `before` experts of one layer."""
    num_groups = sources.config.moe.num_expert_groups
    share = share_of_group(layer, after, num_groups)
    likeness = cosines(sources, layer, by)
    return [members for group in routing_groups(before, num_groups) for members in clusters(likeness, group, share)]


def merged(group: Sequence[int], loads: Sequence[float] | None) -> NewExpert:
    """The weighted average of old experts; where none of them had a token, the even one."""
    weights = [1.0 if loads is None else loads[expert] for expert in group]
    total = sum(weights)
    if total == 0:
        weights, total = [1.0] * len(group), float(len(group))
    parts = [(expert, weight / total) for expert, weight in zip(group, weights, strict=True)]
    return NewExpert(tuple(part for part in parts if part[1] > 0))


def _check_groups(groups: Sequence[Sequence[int]], count: int, layer: int, num_groups: int | None) -> None:
    where = f"the groups of layer {layer}"
    members = []
    for group in groups:
        if not isinstance(group, list | tuple) or not group or not all(type(expert) is int for expert in group):
            raise ConfigError(f"{where} hold {str(group)[:40]}: each group is a list of experts, as [0, 3]")
        members += group
    if sorted(members) != list(range(count)):
        wrong = next(e for e in [*members, *range(count)] if members.count(e) != 1 or not 0 <= e < count)
        times = members.count(wrong) if 0 <= wrong < count else "no"
        what = f"expert {wrong} {times} times" if times != "no" else f"expert {wrong}, which does not exist"
        raise ConfigError(f"{where} hold {what}: name each of the experts 0 to {count - 1} once")
    share = share_of_group(layer, len(groups), num_groups)
    for number, group in enumerate(groups):
        homes = {expert // (count // (num_groups or 1)) for expert in group}
        if homes != {number // share}:
            raise ConfigError(
                f"{where}: {list(group)} would be in routing group {number // share}, but its experts come from "
                f"{sorted(homes)}: merge within a routing group, and keep the order of these"
            )
