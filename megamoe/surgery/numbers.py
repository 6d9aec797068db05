"""Stored elements to fp64 and back, each rounded once; draws that belong to a key and a place. numpy only."""

import numpy as np

from megamoe.checkpoint.floats import narrowed, overflows, widened
from megamoe.errors import ConversionError
from megamoe.topology.initial import Constant, Initial, Normal, seed_of

CHUNK = 1 << 16  # elements that are drawn together; what is drawn depends on it


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Elements as they are stored -> fp64 [same]."""
    return widened(stored, dtype).astype(np.float64)


def encode(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """fp64 -> elements as they are stored, to the nearest, ties to even. Raises ConversionError where one is too large.

    `what` names the tensor in the message.
    """
    rounded = narrowed(values, dtype)
    too_large = overflows(values, rounded, dtype)
    if too_large.any():
        largest = np.abs(values[too_large]).max()
        raise ConversionError(f"{what} would be {largest:.3g} somewhere, which {dtype} cannot hold")
    return rounded


def chunks_of(first: int, last: int) -> list[tuple[int, int, int]]:
    """(number of the chunk, first, last) of the parts of [first, last) that lie in one chunk each."""
    return [
        (number, max(first, number * CHUNK), min(last, (number + 1) * CHUNK))
        for number in range(first // CHUNK, -(-last // CHUNK))
    ]


def draw(initial: Initial, seed: int, key: str, first: int, last: int) -> np.ndarray:
    """Elements [first, last) of the endless draw of `key` under `seed`: fp64.

    Philox (Salmon et al. 2011) counts from the key and the number of the chunk, so that any part is drawn alone.
    """
    if isinstance(initial, Constant):
        return np.full(last - first, initial.value)
    parts = []
    for number, begin, end in chunks_of(first, last):
        words = np.array([seed_of(seed, key), number], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=words))
        if isinstance(initial, Normal):
            values = generator.standard_normal(CHUNK) * initial.std
        else:
            values = (2.0 * generator.random(CHUNK) - 1.0) * initial.bound
        parts.append(values[begin - number * CHUNK : end - number * CHUNK])
    return np.concatenate(parts)
