"""The sizes of attention's arrays and the options of its scores, each named once.

The public functions build them from their keywords; everything below takes them whole.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from paged_mlx.errors import fail, kind_of, whole_number
from paged_mlx.formats.page_format import PageFormats

_PLACES = (mx.Stream, mx.Device, mx.DeviceType, mx.ThreadLocalStream)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class Geometry(NamedTuple):
    """Sizes of a step's queries and pages, and the formats of the pages."""

    num_q_heads: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    v_head_dim: int
    dtype: mx.Dtype
    formats: PageFormats = PageFormats()

    @property
    def page_sizes(self) -> tuple[int, int, int, int, mx.Dtype]:
        """Those of the pages, as ``formats.page_format`` takes them."""
        return self.num_kv_heads, self.page_size, self.head_dim, self.v_head_dim, self.dtype

    def check(self, op: str) -> None:
        """Refuse sizes that no kernel takes.

        Raises:
            ValueError: A size is no whole number, a head_dim or the dtype is not one of the
                kernels', the query heads do not divide among the KV heads, or pages of these
                sizes cannot have the formats.
        """
        for name, size in zip(self._fields[:3], self):
            whole_number(op, name, size, 1)
        check_head_dim(op, "head_dim", self.head_dim)
        check_head_dim(op, "v_head_dim", self.v_head_dim)
        check_dtype(op, self.dtype)
        if self.num_q_heads % self.num_kv_heads:
            must = f"num_q_heads must be a multiple of num_kv_heads = {self.num_kv_heads}"
            fail(op, must, self.num_q_heads)
        self.formats.check(op, self.head_dim, self.v_head_dim, self.page_size)


class AttentionOptions(NamedTuple):
    """What becomes of a score, and which weights take part beside the keys'.

    Attributes:
        scale: Factor of ``q.k``; None: ``head_dim ** -0.5``.
        softcap: ``softcap * tanh(score / softcap)``.
        alibi_slopes: ``[num_q_heads]``; adds ``slope * (key - query position)``.
        sinks: ``[num_q_heads]``, logits that take weight and give no value.
        mask: ``[tokens, keys]`` or ``[num_q_heads or 1, tokens, keys]``, bool or additive.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: mx.array | None = None
    sinks: mx.array | None = None
    mask: mx.array | None = None

    @property
    def kinds(self) -> OptionKinds:
        mask = self.mask
        return OptionKinds(
            self.softcap is not None,
            self.alibi_slopes is not None,
            self.sinks is not None,
            None if mask is None else "boolean" if mask.dtype == mx.bool_ else "additive",
        )

    def with_mask(self, mask: mx.array | None) -> AttentionOptions:
        return self._replace(mask=mask)

    def check(self, op: str) -> None:
        """Refuse values of other types than the kernels take.

        Raises:
            ValueError: A number is none, or an array is no ``mx.array``.
        """
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                check_number(op, name, getattr(self, name))
        for name in ("alibi_slopes", "sinks", "mask"):
            value = getattr(self, name)
            if isinstance(value, str) and value == "causal":
                fail(
                    op,
                    f"{name} must be an mx.array, or None: causal=True is the default",
                    repr(value),
                )
            if value is not None and not isinstance(value, mx.array):
                fail(op, f"{name} must be an mx.array, or None", kind_of(value))


class OptionKinds(NamedTuple):
    """Which options a call has: they decide which kernel text runs."""

    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    mask: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a score is ``scale * q.k`` and nothing else."""
        return not (self.softcap or self.alibi or self.mask)


def check_number(op: str, name: str, value: object) -> None:
    """Refuse what is no number.

    Raises:
        ValueError: It is none; a bool is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        fail(op, f"{name} must be a number", kind_of(value))
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        fail(op, f"{name} must be a number that a float can hold", "a larger one")


def has_kernel(head_dim: int) -> bool:
    """Whether the kernels take a head_dim."""
    return head_dim >= 8 and head_dim % 8 == 0 and (head_dim <= 256 or head_dim == 512)


def check_head_dim(op: str, name: str, value: object) -> int:
    """``value`` as an int, a head_dim that the kernels take.

    Raises:
        ValueError: It is neither a multiple of 8 up to 256 nor 512.
    """
    dim = whole_number(op, name, value, 1)
    if not has_kernel(dim):
        fail(op, f"{name} must be a multiple of 8 up to 256, or 512", dim)
    return dim


def check_dtype(op: str, dtype: object) -> None:
    """Refuse what is no float of 16 or 32 bits.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(dtype, mx.Dtype) or dtype not in FLOATS:
        fail(op, "dtype must be float32, float16 or bfloat16", dtype)


def check_array(op: str, name: str, value: object) -> None:
    """Refuse what is no ``mx.array``.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, mx.array):
        fail(op, f"{name} must be an mx.array", kind_of(value))


def check_stream(op: str, stream: object) -> None:
    """Refuse what is neither a stream nor a device, nor None.

    Raises:
        ValueError: It is none.
    """
    if stream is not None and not isinstance(stream, _PLACES):
        fail(op, "stream must be an mx.Stream or an mx.Device", kind_of(stream))
