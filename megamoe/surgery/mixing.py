"""New experts as weighted sums of old ones: the one form behind pruning, merging and changing the number of experts.

A mixing says for every MoE layer what each new expert is made of. What belongs to an expert moves with it: its stacked
matrices and biases, its row of the router, its balance bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamoe.checkpoint.slices import whole_box
from megamoe.config.schema import Config
from megamoe.surgery.recipes import Noise, Region, Target, Term, build_targets, rows
from megamoe.surgery.sources import BALANCE_BIAS, Sources
from megamoe.topology.parameters import Parameter


@dataclass(frozen=True, slots=True)
class NewExpert:
    """One new expert: (old expert, factor) pairs, and whether noise is put on its matrices and router row."""

    parts: tuple[tuple[int, float], ...]
    is_noisy: bool = False


Mixing = Mapping[int, Sequence[NewExpert]]  # MoE layer -> its new experts in order


def kept(experts: Sequence[int]) -> list[NewExpert]:
    """Old experts as they are, in the order given."""
    return [NewExpert(((expert, 1.0),)) for expert in experts]


def mixing_tree(mixing: Mixing) -> dict[str, object]:
    """A mixing as JSON has it."""
    return {
        str(layer): [[[list(part) for part in expert.parts], expert.is_noisy] for expert in experts]
        for layer, experts in mixing.items()
    }


def mixed_targets(
    sources: Sources, config: Config, mixing: Mixing, *, noise: float = 0.0, seed: int = 1
) -> tuple[Target, ...]:
    """Every tensor of the model of `config`, whose experts are those of the mixing. Raises as `build_targets`."""

    def change(parameter: Parameter) -> list[Region] | None:
        if parameter.kind not in ("router", "expert") or parameter.layer not in mixing:
            return None
        return _regions(sources, parameter, mixing[parameter.layer], noise, seed)

    return build_targets(sources, config, change) + _balance_biases(sources, mixing)


def _regions(
    sources: Sources, parameter: Parameter, experts: Sequence[NewExpert], noise: float, seed: int
) -> list[Region]:
    entry = sources.parameter(parameter.name)
    entry = sources.parameter_like(parameter, (entry.shape[0], *parameter.shape[1:]))
    old, new = whole_box(entry.shape), whole_box(parameter.shape)
    regions: list[Region] = []
    for number, expert in enumerate(experts):
        terms = tuple(Term(0, entry, rows(old, index, index + 1), factor) for index, factor in expert.parts)
        own = Noise(noise, seed, f"{parameter.name}/{number}") if expert.is_noisy and noise else None
        regions.append(Region(rows(new, number, number + 1), terms, own))
    return _joined(regions)


def _joined(regions: Sequence[Region]) -> list[Region]:
    """Neighbours that are copies of neighbours as one region: a checkpoint then has fewer slices."""
    joined: list[Region] = []
    for region in regions:
        last = joined[-1] if joined else None
        if last is not None and _is_copy(last) and _is_copy(region):
            (before,), (term,) = last.terms, region.terms
            if before.box[0][1] == term.box[0][0]:
                term = Term(0, term.entry, rows(term.box, before.box[0][0], term.box[0][1]))
                joined[-1] = Region(rows(region.box, last.box[0][0], region.box[0][1]), (term,))
                continue
        joined.append(region)
    return joined


def _is_copy(region: Region) -> bool:
    return len(region.terms) == 1 and region.terms[0].factor == 1.0 and region.noise is None


def _balance_biases(sources: Sources, mixing: Mixing) -> tuple[Target, ...]:
    """They are carried: the bias of a new expert is the same weighted sum of old ones, without noise."""
    targets = []
    for layer, experts in mixing.items():
        entry = sources.balance_bias(layer)
        if entry is None:
            continue
        regions = tuple(
            Region(((number, number + 1),), tuple(Term(0, entry, ((i, i + 1),), factor) for i, factor in expert.parts))
            for number, expert in enumerate(experts)
        )
        targets.append(Target(BALANCE_BIAS, entry.name, entry.dtype, (len(experts),), regions))
    return tuple(targets)
