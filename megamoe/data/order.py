"""Which sample comes when: a shuffle and a blend, both as arithmetic on the sample's number.

Nothing here keeps a table. A permutation array of the paper's corpus (55 million blocks) costs hundreds of megabytes
in every rank and seconds at every start, and numpy does not promise that its shuffles stay the same from one version
to the next, which would break a resumed run. Integer arithmetic is exact everywhere and answers any index at once.
"""

import hashlib
import heapq
import math
from dataclasses import dataclass
from fractions import Fraction

NUM_ROUNDS = 8
MASK = (1 << 64) - 1


class Permutation:
    """A pseudo-random bijection of [0, size), fixed by (seed, stream, epoch).

    A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): a number below
    rows * columns, the smallest near-square rectangle that holds `size`, is split into row and column; each round
    shifts one by a keyed hash of the other, which can be undone, so the whole is a bijection of the rectangle. The
    few numbers that land outside [0, size) walk on until they are inside, which keeps it a bijection of [0, size).
    """

    def __init__(self, size: int, *, seed: int, stream: int, epoch: int) -> None:
        self.size = size
        self._columns = math.isqrt(size - 1) + 1
        self._rows = -(-size // self._columns)
        digest = hashlib.blake2b(f"{seed}:{stream}:{epoch}".encode(), digest_size=8 * NUM_ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(NUM_ROUNDS)]

    def __call__(self, index: int) -> int:
        """The image of `index`, which must be in [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in [0, {self.size})")
        while True:
            index = self._shift(index)
            if index < self.size:
                return index

    def _shift(self, index: int) -> int:
        rows, columns = self._rows, self._columns
        row, column = divmod(index, columns)
        for key in self._keys[0::2]:
            row = (row + _hash(column, key)) % rows
            column = (column + _hash(row, key ^ MASK)) % columns
        for key in self._keys[1::2]:
            row = (row + _hash(column, key)) % rows
            column = (column + _hash(row, key ^ MASK)) % columns
        return row * columns + column


def _hash(value: int, key: int) -> int:
    """64 well-mixed bits of (value, key): the finaliser of SplitMix64."""
    value = (value * 0x9E3779B97F4A7C15 + key) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class _Node:
    """Two sub-streams merged into one; `left_weight / weight` of its samples come from the left."""

    weight: int
    left_weight: int
    left: "_Node | int"  # an int is a corpus number
    right: "_Node | int"


class Blend:
    """Endless interleaving of corpora in given proportions: sample number -> (corpus, number within that corpus).

    Corpora are paired like the leaves of a Huffman tree. At a node, of the first i samples round(i * share) come from
    the left, so each choice is one integer division and the stream never drifts: with two or three corpora any prefix
    of length i holds within one sample of weight * i of each corpus, with any number of them within 1.7.
    """

    def __init__(self, weights: tuple[float, ...]) -> None:
        """`weights` are positive and need not sum to one."""
        # repr() gives the decimal that the user wrote, so that 0.1 is a tenth and not its nearest binary fraction.
        fractions = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        heap = [(int(fraction * scale), number, number) for number, fraction in enumerate(fractions)]
        heapq.heapify(heap)
        next_number = len(heap)  # breaks ties between equal weights, so that nodes are never compared
        while len(heap) > 1:
            left_weight, _, left = heapq.heappop(heap)
            right_weight, _, right = heapq.heappop(heap)
            weight = left_weight + right_weight
            heapq.heappush(heap, (weight, next_number, _Node(weight, left_weight, left, right)))
            next_number += 1
        self._root: _Node | int = heap[0][2]

    def locate(self, index: int) -> tuple[int, int]:
        """The corpus that sample `index` comes from, and how many samples of that corpus came before it."""
        node = self._root
        while isinstance(node, _Node):
            before = (2 * index * node.left_weight + node.weight) // (2 * node.weight)
            after = (2 * (index + 1) * node.left_weight + node.weight) // (2 * node.weight)
            if after > before:
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index
