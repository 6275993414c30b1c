"""Tests of the public API that need no fixture: together they tell every wrong operation.

A case is a test function of one of ``MODULES``, with all its parameters.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType

import pytest

from .mutant import Mutant

MODULES = (
    "conformance.test_fast",
    "conformance.test_chapter",
    "conformance.test_handed_over",
    "conformance.test_compiled_graphs",
    "plan.test_previous",
    "pool.test_carried_state",
    "pool.test_pool_plans",
    "pool.test_pool",
    "pool.test_pool_canary",
    "pool.test_pool_memory",
    "pool.test_write_attend",
    "pages.test_allocator",
    "pages.test_block_table",
    "pages.test_copy_on_write",
    "pages.test_page_table",
    "pages.test_table_corners",
    "pages.test_canary",
    "prefix.test_prefix_cache",
    "conformance.test_input_layouts",
    "conformance.test_not_finite",
)


def cases(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite, by name: ``module.function`` without the ``test_`` of either."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for function in _tests(module):
            case = f"{_plain(name.partition('.')[2])}.{_plain(function.__name__)}"
            found[case] = partial(_run, function)
    return found


def _plain(name: str) -> str:
    return name.removeprefix("test_")


def _tests(module: ModuleType) -> Iterator[FunctionType]:
    """Its test functions whose arguments are all parameters, and that are quick."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_") or function.__module__ != module.__name__:
            continue
        marks = getattr(function, "pytestmark", [])
        given = {n for mark in marks if mark.name == "parametrize" for n in _names(mark)}
        wanted = set(inspect.signature(function).parameters)
        if wanted == given and not any(mark.name in ("long", "skipif") for mark in marks):
            yield function


def _names(mark) -> list[str]:
    names = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _run(function: FunctionType) -> str | None:
    """Call a test with every combination of its parameters; say why it failed, if it did."""
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    rows = [[_row(_names(mark), values) for values in mark.args[1]] for mark in marks]
    for combination in itertools.product(*rows):
        try:
            function(**{name: value for row in combination for name, value in row.items()})
        except pytest.fail.Exception as failure:  # no Exception: pytest.raises that nothing raises
            return str(failure)
    return None


def _row(names: list[str], values) -> dict:
    values = getattr(values, "values", values) if not isinstance(values, dict) else values
    return dict(zip(names, [values] if len(names) == 1 else values))
