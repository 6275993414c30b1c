"""Faults planted in kernels, launch code, planner, CPU backend, operations and Python, to be caught by the tests.

``python -m mutants`` from ``tests/`` with ``support/`` on the path, or ``make mutants``. The list is data: ``MUTANTS``.
Each mutant runs in a process of its own against a suite of few cases; one that no case
sees is a hole in the tests.

    mutant          one place in one file, changed so that it is wrong
    *_mutants       the list, by layer; page_faults: the part of Python's that is about pages
    *_suite         the cases, by layer
    native          the native module with one source changed, built in the user's cache
    api_suite       the cases of operations and Python: tests of the public API
    trial           one mutant against its suite; runner: many
"""

from . import (
    contract_mutants,
    cpu_mutants,
    header_mutants,
    kernel_mutants,
    launch_mutants,
    ops_mutants,
    planner_mutants,
    python_mutants,
)
from .mutant import LAYERS, Mutant

MUTANTS: list[Mutant] = [
    *header_mutants.MUTANTS,
    *kernel_mutants.MUTANTS,
    *launch_mutants.MUTANTS,
    *contract_mutants.MUTANTS,
    *planner_mutants.MUTANTS,
    *cpu_mutants.MUTANTS,
    *ops_mutants.MUTANTS,
    *python_mutants.MUTANTS,
]


def find(name: str) -> Mutant:
    """The mutant of that name."""
    return next(mutant for mutant in MUTANTS if mutant.name == name)


__all__ = ["LAYERS", "MUTANTS", "Mutant", "find"]
