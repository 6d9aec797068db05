"""Another number of experts: more by copies, fewer by pruning or merging, layer by layer.

Copies stand next to what they are copies of, router row and balance bias included, so that they have its score and stay
in its routing group. No bias is put on the router to tell them apart. (Copies of trained experts, fixed top-k: Dwivedi
et al. 2026, "Expert Upcycling", arXiv 2604.19835.)

    E old experts   M new ones   c = M / E
    Copies of one expert share what the softmax gave it. With c whole and top_k times c, all copies of the old choices
    are chosen, with gates that sum to the old ones: the function is the same.
"""

from collections.abc import Sequence
from typing import Literal

from megamoe.config.schema import MoEConfig
from megamoe.errors import ConfigError
from megamoe.surgery.counts import counts_of, moe_counts, old_and_new, validated
from megamoe.surgery.loads import Loads, busiest_first, routing_groups, share_of_group
from megamoe.surgery.merge import alike, merged
from megamoe.surgery.mixing import NewExpert, mixed_targets, mixing_tree
from megamoe.surgery.prune import pruned
from megamoe.surgery.recipes import Plan
from megamoe.surgery.similarity import By
from megamoe.surgery.sources import Sources, changed_config, changed_rules
from megamoe.surgery.upcycle import check_noise

Shrink = Literal["prune", "merge"]


def plan_resize(
    sources: Sources,
    num_experts: int | Sequence[int],
    *,
    shrink: Shrink = "prune",
    by: By = "router",
    loads: Loads | None = None,
    noise: float = 0.0,
    seed: int = 1,
    settings: Sequence[str] = (),
) -> Plan:
    """`num_experts` in each MoE layer, or so many by layer.

    loads: tokens of each expert by layer. More experts: all are copied equally often, of the rest the busiest (without
    loads the first) once more; the first of each stays as it is, the other copies get Gaussian noise whose standard
    deviation is `noise` times the root mean square of what it is added to. Fewer: as in `plan_prune`, which needs
    loads, or merged with those alike. Raises ConversionError for a dense model, ConfigError for what does not fit.
    """
    check_noise(noise)
    counts = counts_of(num_experts)
    pairs = old_and_new(sources, counts)
    config = validated(changed_config(sources, settings, moe_counts(counts)))
    num_groups = config.moe.num_expert_groups
    mixing: dict[int, list[NewExpert]] = {}
    for layer, (before, after) in pairs.items():
        own = None if loads is None else loads[layer]
        if after >= before:
            mixing[layer] = grown(before, after, own, layer, num_groups)
        elif shrink == "merge":
            mixing[layer] = [merged(group, own) for group in alike(sources, layer, before, after, by)]
        elif own is None:
            raise ConfigError(
                f"layer {layer} shrinks from {before} to {after} experts by load: give the loads, or merge"
            )
        else:
            mixing[layer] = pruned(before, after, own, layer, num_groups)
    targets = mixed_targets(sources, config, mixing, noise=noise, seed=seed)
    arguments = {"mixing": mixing_tree(mixing), "noise": noise, "seed": seed}
    changed = changed_rules(sources.config.moe, config.moe)
    preserves = _preserves(sources.config.moe, config.moe, list(pairs.values()), noise)
    return Plan("resize", arguments, config, targets, preserves, _notes(pairs) + changed)


def grown(
    before: int, after: int, loads: Sequence[float] | None, layer: int, num_groups: int | None
) -> list[NewExpert]:
    """Old experts, each followed by its copies, which are to be noisy."""
    share = share_of_group(layer, after, num_groups)
    experts = []
    for group in routing_groups(before, num_groups):
        each, rest = divmod(share, len(group))
        again = set((list(group) if loads is None else busiest_first(loads, group))[:rest])
        for expert in group:
            number = each + (expert in again)
            experts += [NewExpert(((expert, 1.0),), is_noisy=copy > 0) for copy in range(number)]
    return experts


def _preserves(old: MoEConfig, new: MoEConfig, pairs: Sequence[tuple[int, int]], noise: float) -> str:
    """The statement for the whole model; it says "the function" only where that is so for every token."""
    ratios = {after / before for before, after in pairs}
    times = ratios.pop() if len(ratios) == 1 else 0.0
    if changed_rules(old, new, besides=("top_k",)):
        return "the experts that stay, under other rules"
    if times == 1 and new.top_k == old.top_k:
        return "all of it"
    is_shared = new.normalize_gates or new.score_function == "softmax"  # copies share the gate of their original
    is_same_group = new.num_expert_groups is None or new.score_function == "softmax"  # sigmoid: the best two count
    if times > 1 and times.is_integer() and new.top_k == times * old.top_k and is_shared and is_same_group:
        text = "the function, where no token is dropped: all copies of a chosen expert are chosen"
        return f"{text}; but for the noise" if noise else text
    if times > 1 and times.is_integer():
        return f"the experts, not the choice: of top_k {new.top_k} some are copies of each other until they differ"
    return "the experts that stay, not the choice among them"


def _notes(pairs: dict[int, tuple[int, int]]) -> tuple[str, ...]:
    return tuple(f"layer {layer}: {before} -> {after} experts" for layer, (before, after) in pairs.items())
