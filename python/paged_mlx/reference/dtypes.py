"""The three element types as numpy arrays.

numpy has no bfloat16, so its values travel as the bits (``uint16``). ``encode`` rounds to
the element type, ``decode`` widens exactly to float32.
"""

from __future__ import annotations

import numpy as np

NAMES = ("float32", "float16", "bfloat16")

#: Distance from 1.0 to the next value.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

#: Smallest positive value, a subnormal.
TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}

#: Largest finite value.
HUGE = {
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": (2.0 - 2.0**-7) * 2.0**127,
}

#: The numpy type that carries the values.
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to nearest even; NaN stays NaN, what is too large becomes infinite."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The stored values as float32, exactly."""
    if dtype != "bfloat16":
        return np.asarray(stored).astype(np.float32, copy=False)
    return (np.ascontiguousarray(stored).astype(np.uint32) << 16).view(np.float32)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values that the element type can hold, nearest to ``values``."""
    return decode(encode(values, dtype), dtype)
