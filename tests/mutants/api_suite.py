"""Tests of the public API: together they tell every wrong operation.

A case is a test function of one of ``MODULES``, with all its parameters and with fixtures of its
own file that only return something.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType

import pytest

from .mutant import ROOT, Mutant

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
    "pages.test_odd_arguments",
    "prefix.test_prefix_cache",
    "conformance.test_input_layouts",
    "conformance.test_not_finite",
    "cpu.test_formats",
    "formats.test_quantised_pool",
    "formats.test_raw_pages",
    "mlx_lm.test_speculative_batch",
    "mlx_lm.test_threads",
)


def cases(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite, by name: ``module.function`` without the ``test_`` of either."""
    found = {}
    for name in MODULES:
        module = _imported(name)
        for function in _tests(module):
            case = f"{_plain(name.partition('.')[2])}.{_plain(function.__name__)}"
            found[case] = partial(_run, module, function)
    return found


def _imported(name: str) -> ModuleType:
    """A test file as a module, also where its folder has the name of a package."""
    path = ROOT.joinpath("tests", *name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _plain(name: str) -> str:
    return name.removeprefix("test_")


def _tests(module: ModuleType) -> Iterator[FunctionType]:
    """Its test functions whose arguments can be given here, and that are quick."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_") or function.__module__ != module.__name__:
            continue
        marks = getattr(function, "pytestmark", [])
        given = {n for mark in marks if mark.name == "parametrize" for n in _names(mark)}
        wanted = [name for name in inspect.signature(function).parameters if name not in given]
        if all(_fixture(module, name) for name in wanted) and not any(
            mark.name in ("long", "skipif") for mark in marks
        ):
            yield function


def _fixture(module: ModuleType, name: str) -> Callable | None:
    """The function below a fixture of a test file; None where it is not so simple."""
    function = getattr(getattr(module, name, None), "__wrapped__", None)
    if function is None or inspect.isgeneratorfunction(function):
        return None
    simple = all(_fixture(module, n) for n in inspect.signature(function).parameters)
    return function if simple else None


def _made(module: ModuleType, name: str, made: dict) -> object:
    """What a fixture returns, and those it asks for; ``made``: what there is already."""
    if name not in made:
        function = _fixture(module, name)
        wanted = inspect.signature(function).parameters
        made[name] = function(**{n: _made(module, n, made) for n in wanted})
    return made[name]


def _names(mark) -> list[str]:
    names = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _run(module: ModuleType, function: FunctionType) -> str | None:
    """Call a test with every combination of its parameters; say why it failed, if it did."""
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    rows = [[_row(_names(mark), values) for values in mark.args[1]] for mark in marks]
    for combination in itertools.product(*rows):
        made = {name: value for row in combination for name, value in row.items()}
        try:
            function(**{n: _made(module, n, made) for n in inspect.signature(function).parameters})
        except pytest.fail.Exception as failure:  # no Exception: pytest.raises that nothing raises
            return str(failure)
    return None


def _row(names: list[str], values) -> dict:
    values = getattr(values, "values", values) if not isinstance(values, dict) else values
    return dict(zip(names, [values] if len(names) == 1 else values))
