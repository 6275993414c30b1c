"""Few cases that together tell every wrong launch: those of the kernels, and some more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
from metal_kernels import attend, launcher
from paged_mlx._native import _ext
from paged_mlx.testing import Case, Check

from . import kernels_suite
from .mutant import Mutant


def _odd_rows() -> str | None:
    """Rows of K of 32 bytes and of V of 10, written by one dispatch."""
    k, v = (kernels_suite.normal((2, 2, dim), dim, mx.float16) for dim in (16, 5))
    slots = mx.array([9, 2])

    def work():
        pages = [mx.zeros((3, 2, 4, dim), mx.float16) for dim in (16, 5)]
        mx.eval(pages)
        return _ext.write_pages([k, v], pages, slots, alias=True)

    return kernels_suite.compare(work, None, 0.0)


def _every_kind() -> str | None:
    """Items of one, eight and many rows in one step."""
    case = Case(
        num_q_heads=2,
        num_kv_heads=2,
        sequences=((1, 40), (2, 50), (9, 60), (4, 33), (60, 60)),
        values="needles",
        seed=1,
    )
    return kernels_suite.check(Check("", case), None, {"attend_vector", "attend_tile"})


@contextmanager
def _launch_code(mutant: Mutant) -> Iterator[None]:
    """The launch code is compiled by itself: what it calls its pipelines is not in a dispatch."""
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / Path(mutant.file).name
        changed.write_text(mutant.text)
        sources = launcher.SOURCES
        launcher.SOURCES = tuple(changed if path.name == changed.name else path for path in sources)
        launcher.library.cache_clear()
        try:
            yield
        finally:
            launcher.SOURCES = sources
            launcher.library.cache_clear()


def _variants(mutant: Mutant) -> str | None:
    """A variant is another where one of its parts is."""
    with _launch_code(mutant):
        return None if launcher.variants_are_told_apart() else "variants are mistaken for another"


def _pipeline_names(mutant: Mutant) -> str | None:
    """Variants that differ in a macro or in a function constant differ in name."""
    with _launch_code(mutant):
        case = Case(num_q_heads=4, sequences=((1, 20),))
        changes = [{}, {"softcap": 3.0}, {"page_size": 8}, {"v_head_dim": 32}, {"dtype": "float16"}]
        launched = [attend(case.replace(**change).build()).launches[0] for change in changes]
    names = len({x.name for x in launched})
    libraries = len({x.library for x in launched})
    if (names, libraries) != (5, 3):
        return f"{names} names and {libraries} libraries for 5 pipelines of 3 texts"
    return None


def _formats(mutant: Mutant) -> str | None:
    """Quantised pages attended, written, sealed and gathered by the launch code alone."""
    names = [name for name in kernels_suite.CASES if name.startswith("formats, ")]
    with _launch_code(mutant):
        for name in names:
            reason = kernels_suite.CASES[name](None)
            if reason:
                return f"{name}: {reason}"
    return None


def cases(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite, by name."""
    return {
        **kernels_suite.cases(mutant),
        "every kind": _every_kind,
        "odd rows": _odd_rows,
        "pipeline names": partial(_pipeline_names, mutant),
        "variants": partial(_variants, mutant),
        "formats": partial(_formats, mutant),
    }
