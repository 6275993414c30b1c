"""Names, sizes and arrays of the formats that pages may have, K's and V's apart.

    None   the elements themselves
    q8     a scale and a bias for each token, head and group of channels; codes of 8 bits
    q4     V: rotated along head_dim first, then as q8 with codes of 4 bits
           K: a scale and a bias for each channel of a page and head; codes of 4 bits. A page is
           quantised when it takes no more tokens; until then it is an *open page*, K and V of it
           as they are, in arrays of their own

``csrc/page_format.h`` says the same to the native code.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from paged_mlx.errors import fail, kind_of
from paged_mlx.prefix.hash import ExtraKey

NAMES = ("q8", "q4")
BITS = {"q8": 8, "q4": 4}
DEFAULT_PAGE_SIZE = 64  #: of pages whose K is q4
SMALLEST_PAGE = 8  #: of them: below it the scales take what the codes save


class PageFormats(NamedTuple):
    """The formats of K and of V: None, ``"q8"`` or ``"q4"`` each."""

    k: str | None = None
    v: str | None = None

    @property
    def are_dense(self) -> bool:
        """Whether nothing is quantised."""
        return self.k is None and self.v is None

    @property
    def extra_keys(self) -> tuple[ExtraKey, ...]:
        """What a prefix cache must be asked with beside the tokens: nothing for dense pages."""
        return () if self.are_dense else (ExtraKey("format", str(self)),)

    @property
    def told(self) -> dict[str, PageFormats]:
        """What operations are told beside the arrays: nothing of dense pages."""
        return {} if self.are_dense else {"formats": self}

    @property
    def have_open_pages(self) -> bool:
        """Whether a page is quantised as a whole, and stays as it is until then."""
        return self.k == "q4"

    @property
    def rotate(self) -> bool:
        """Whether V is rotated."""
        return self.v == "q4"

    @property
    def default_page_size(self) -> int | None:
        """Tokens in a page that suit the formats; None: any do."""
        return DEFAULT_PAGE_SIZE if self.have_open_pages else None

    def __str__(self) -> str:
        return "/".join(name or "dense" for name in self)

    def check(self, op: str, head_dim: int, v_head_dim: int, page_size: int) -> None:
        """Refuse formats that do not exist, or that pages of these sizes cannot have.

        Raises:
            ValueError: The message says which and why.
        """
        for name, value in zip(("k_format", "v_format"), self):
            if value is not None and (not isinstance(value, str) or value not in NAMES):
                fail(op, f'{name} must be None, "q8" or "q4"', kind_of(value))
        if self.have_open_pages and page_size < SMALLEST_PAGE:
            must = (
                f'page_size must be at least {SMALLEST_PAGE} for k_format="q4", which has a scale '
                f"for each channel of a page ({DEFAULT_PAGE_SIZE} suits it)"
            )
            fail(op, must, page_size)
        if self.k == "q8":
            _check_groups(op, "head_dim", 'k_format="q8"', head_dim)
        if self.v is not None:
            _check_groups(op, "v_head_dim", f'v_format="{self.v}"', v_head_dim)
        if self.rotate and not rotation_size(v_head_dim):
            must = (
                'v_head_dim must be a power of two or a multiple of 64 for v_format="q4", which '
                'rotates it; "q8" takes any multiple of 32'
            )
            fail(op, must, v_head_dim)


def formats_of(op: str, name: str, value: object) -> PageFormats:
    """The formats that one option names: one for both sides, or ``(K's, V's)``.

    Raises:
        ValueError: It is neither.
    """
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    known = all(side is None or isinstance(side, str) and side in NAMES for side in pair)
    if len(pair) != 2 or not known:
        fail(op, f'{name} must be None, "q8", "q4", or a pair of them for K and V', repr(value))
    return PageFormats(*pair)


def group_size(head_dim: int) -> int:
    """Channels that share a token's scale; 0: a format of tokens cannot take this head_dim."""
    return 64 if head_dim % 64 == 0 else 32 if head_dim % 32 == 0 else 0


def rotation_size(head_dim: int) -> int:
    """Channels that are rotated together; 0: this head_dim cannot be."""
    return head_dim if head_dim & (head_dim - 1) == 0 else 64 if head_dim % 64 == 0 else 0


def _check_groups(op: str, name: str, wanted: str, head_dim: int) -> None:
    if not group_size(head_dim):
        fail(op, f"{name} must be a multiple of 32 for {wanted}, whose groups it fills", head_dim)


class ArraySpec(NamedTuple):
    """One array of a layer: what follows ``[num_pages]`` in its shape, and its dtype."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one page of one layer."""
        size = self.dtype.size
        for length in self.shape:
            size *= length
        return size


def page_arrays(
    formats: PageFormats,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    v_head_dim: int,
    dtype: mx.Dtype,
) -> list[ArraySpec]:
    """The arrays of a layer with an entry for each page, K's and then V's."""
    specs = []
    for side, (name, dim) in enumerate(zip(formats, (head_dim, v_head_dim))):
        if name is None:
            specs.append(ArraySpec((num_kv_heads, page_size, dim), dtype))
            continue
        per_word = 32 // BITS[name]
        specs.append(ArraySpec((num_kv_heads, page_size, dim // per_word), mx.uint32))
        by_channel = side == 0 and name == "q4"
        scales = (
            (num_kv_heads, dim) if by_channel else (num_kv_heads, page_size, dim // group_size(dim))
        )
        specs += [ArraySpec(scales, dtype)] * 2
    return specs


def open_arrays(
    formats: PageFormats,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    v_head_dim: int,
    dtype: mx.Dtype,
) -> list[ArraySpec]:
    """The arrays of a layer with an entry for each open page: K's and V's, or none."""
    if not formats.have_open_pages:
        return []
    return [ArraySpec((num_kv_heads, page_size, dim), dtype) for dim in (head_dim, v_head_dim)]


def page_nbytes(formats: PageFormats, *sizes) -> int:
    """Bytes of K and V of one page of one layer; sizes as of ``page_arrays``."""
    return sum(spec.nbytes for spec in page_arrays(formats, *sizes))


class Sides(NamedTuple):
    """A layer's arrays by what they are for."""

    k: list
    v: list
    open: list


def sides_of(pages: list, formats: PageFormats) -> Sides:
    """A layer's arrays taken apart."""
    k = 1 if formats[0] is None else 3
    v = k + (1 if formats[1] is None else 3)
    return Sides(list(pages[:k]), list(pages[k:v]), list(pages[v:]))
