"""Which experts of a layer are alike, by their router rows or by their own weights, and groups of them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.slices import STORAGE, Slice, volume, whole_box
from megamoe.surgery.numbers import decode
from megamoe.surgery.recipes import rows
from megamoe.surgery.sources import Sources

By = Literal["router", "weights"]
_WINDOW_ELEMENTS = 1 << 20  # of all experts together; sums depend on it in their last bits


def cosines(sources: Sources, layer: int, by: By) -> np.ndarray:
    """Cosine of every pair of experts: [E, E] fp64, ones on the diagonal. Read once, window by window.

    by: "router" takes the router's rows, "weights" all that an expert holds, laid end to end. An expert of zeros is
    like no other.
    """
    if by == "router":
        entries = [sources.parameter(f"layers.{layer}.router.weight")]
    else:
        names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        found = [sources.find(f"layers.{layer}.experts.{name}") for name in names]
        entries = [entry for entry in found if entry is not None]
    products = sum(_products(sources, entry) for entry in entries)
    lengths = np.sqrt(np.diag(products))
    scale = np.where(lengths > 0, lengths, 1.0)
    angles = products / scale[:, None] / scale[None, :]
    np.fill_diagonal(angles, 1.0)
    return angles


def _products(sources: Sources, entry: TensorEntry) -> np.ndarray:
    """Inner products [E, E] of the rows of a tensor [E, ...]."""
    num_experts, box = entry.shape[0], whole_box(entry.shape)
    size = volume(box) // num_experts
    step = max(1, _WINDOW_ELEMENTS // num_experts)
    total = np.zeros((num_experts, num_experts))
    for first in range(0, size, step):
        last = min(first + step, size)
        stored = np.empty((num_experts, last - first), STORAGE[entry.dtype])
        for expert in range(num_experts):
            one = rows(box, expert, expert + 1)
            wanted = Slice(entry.kind, entry.name, entry.dtype, entry.shape, one, first, last)
            sources.read(0, wanted, stored[expert])
        values = decode(stored, entry.dtype)
        total += values @ values.T
    return total


def clusters(likeness: np.ndarray, experts: Sequence[int], count: int) -> list[list[int]]:
    """`experts` in `count` groups of alike ones: each ascending, the groups by their first member.

    Hierarchical, average linkage: begin with every expert alone, join the two groups whose members are most alike on
    average, go on until `count` are left. Of equally alike pairs the one of lower numbers is joined. (So are experts
    grouped by Chen et al. 2024, "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", there by outputs.)
    """
    groups = [[expert] for expert in sorted(experts)]
    sums = likeness[np.ix_(sorted(experts), sorted(experts))].copy()  # of likeness over all pairs of two groups
    while len(groups) > count:
        sizes = np.array([len(group) for group in groups])
        means = sums / sizes[:, None] / sizes[None, :]
        means[np.tril_indices(len(groups))] = -np.inf
        one, other = (int(index) for index in np.unravel_index(means.argmax(), means.shape))
        groups[one] = sorted(groups[one] + groups.pop(other))
        sums[one] += sums[other]
        sums[:, one] += sums[:, other]
        sums = np.delete(np.delete(sums, other, axis=0), other, axis=1)
    return sorted(groups)
