"""Tables and lengths are host data: lists, numpy arrays, evaluated mx.arrays."""

import mlx.core as mx
import numpy as np

from paged_mlx._native import _ext
from paged_mlx.errors import fail

INT32 = np.iinfo(np.int32)


def host_ints(op: str, name: str, values: object) -> np.ndarray:
    """``values`` as a contiguous int32 numpy array.

    An mx.array is read on the host, which evaluates it if it is lazy.

    Raises:
        ValueError: The values are not integers that fit in 32 bits, or stand
            for an input while ``mx.compile`` traces.
    """
    if type(values) is np.ndarray and values.dtype == np.int32 and values.flags.c_contiguous:
        return values
    if isinstance(values, mx.array):
        if _ext.is_tracer(values):
            fail(
                op,
                f"{name} must be host data, known when the step is built; inside mx.compile make "
                "the plan outside and pass plan=plan.array as an input",
                "a traced array",
            )
        if values.dtype in (mx.float16, mx.bfloat16, mx.float32):
            fail(op, f"{name} must hold integers", values.dtype)
    array = np.asarray(values)
    if array.dtype == np.int32:
        return np.ascontiguousarray(array)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        fail(op, f"{name} must hold integers", f"dtype {array.dtype}")
    if array.min() < INT32.min or array.max() > INT32.max:
        worst = max(array.min(), array.max(), key=abs)
        fail(op, f"{name} must fit in 32 bits", worst)
    return np.ascontiguousarray(array, np.int32)


def optional_ints(op: str, name: str, values: object) -> np.ndarray | None:
    """:func:`host_ints` of what may be left out."""
    return None if values is None else host_ints(op, name, values)
