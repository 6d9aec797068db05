"""Floating-point numbers as tensor files hold them, and as numpy computes with them.

numpy has no bfloat16, so both 16-bit formats travel as uint16 (`slices.STORAGE`). To a narrower format numbers go as
IEEE 754 has it: to the nearest, ties to even, rounded once. What is too large becomes infinite; NaN stays NaN.
"""

import numpy as np

FLOATS = ("F64", "F32", "F16", "BF16")


def widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored elements as numbers, exactly: fp32 for 16-bit formats, else the same array."""
    if dtype == "BF16":  # the upper half of an fp32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32) if dtype == "F16" else stored


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 or fp64 numbers as elements of F32, F16 or BF16 are stored."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "F32":
            return values.astype(np.float32, copy=False)
        if dtype == "F16":
            return values.astype(np.float16).view(np.uint16)
        return _bfloat16(values if values.dtype == np.float32 else _rounded_to_odd(values))


def overflows(values: np.ndarray, stored: np.ndarray, dtype: str) -> np.ndarray:
    """[same] Which of the numbers are finite, but not as they are stored."""
    return np.isfinite(values) & ~np.isfinite(widened(stored, dtype))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Half of the last place that stays, less one where that place is even: a carry then is rounding up.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():  # its payload may lie in the half that goes: the quiet bit keeps it from becoming infinite
        rounded = np.where(is_nan, (bits >> 16).astype(np.uint16) | 0x0040, rounded)
    return rounded


def _rounded_to_odd(values: np.ndarray) -> np.ndarray:
    """fp64 to fp32, with a last bit that tells "not exact": it keeps the second rounding from being wrong.

    (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".)
    """
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32).copy()
    bits -= (np.abs(back) > np.abs(values)).astype(np.uint32)  # toward zero
    bits |= ((back != values) & ~np.isnan(values)).astype(np.uint32)
    return bits.view(np.float32)
