"""Operations on quantised pages are proven before a GPU is trusted with them."""

import mlx.core as mx
import pytest
from paged_mlx._native import BUILT, _ext
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.machine import first_use
from paged_mlx.machine.first_use import Variant, prove

PAIRS = [("q8", "q8"), ("q8", "q4"), ("q4", "q4"), ("q4", None)]
OPS = ("paged_attention", "write_pages", "gather_pages", "seal_pages")
pytestmark = pytest.mark.skipif(not BUILT, reason="MLX's own operations need no proof")


def variants(*ops):
    return [
        Variant(op, "float16", 64, 64, 16, rows=2, formats=PageFormats(*pair))
        for pair in PAIRS
        for op in ops
        if op != "seal_pages" or pair[0] == "q4"
    ]


@pytest.mark.parametrize("variant", variants(*OPS), ids=lambda v: f"{v.op} {v.formats}")
def test_right_operations_are_proven(variant):
    assert prove(variant, mx.cpu)


@pytest.mark.parametrize(
    "variant", variants("write_pages", "seal_pages"), ids=lambda v: f"{v.op} {v.formats}"
)
def test_a_page_that_goes_elsewhere_is_found(variant, monkeypatch):
    class Wrong:
        def __getattr__(self, name):
            return getattr(_ext, name)

        def write_pages(self, tokens, pages, slots, **options):
            return _ext.write_pages(tokens, pages, mx.where(slots % 7 == 3, -1, slots), **options)

        def seal_pages(self, sources, pages, pairs, **options):
            return _ext.seal_pages(sources, pages, mx.array(pairs.tolist()[:5]), **options)

    monkeypatch.setattr(first_use, "_ext", Wrong())
    assert not prove(variant, mx.cpu)
