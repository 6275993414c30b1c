"""The conformance suite: can a paged attention tell a right page from a wrong one?

A backend is a function from a ``Problem`` (numpy arrays) to ``(out, lse)``. To run the suite
on a kernel of your own:

    from paged_mlx.testing import Backend, grid, report, run_suite

    mine = Backend("mine", attend=lambda problem: my_attention(problem.q, ...))
    print(report.table(run_suite(grid.quick(), [mine])))

``python -m paged_mlx.testing`` runs it on this package's own backends.

    oracle     attention from the definition, float64
    yardstick  float32 attention and ``judge``: the one home of tolerances
    case       a call by its numbers; problem, tables: its arrays, poisoned
    needle     a key in every page that one query must find
    checks     conditions on a result; grid, small, pairwise: the cases
    runner     groups x backends; report: the table; shrink: the smallest failing case
    graph      random programs over a pool; large: pools beyond 2^31 elements
"""

from paged_mlx.reference import needle
from paged_mlx.reference.case import Case
from paged_mlx.reference.problem import Problem
from paged_mlx.reference.yardstick import Verdict, judge, judge_lse

from . import backends, grid, report, small
from .backends import Backend
from .checks import Check, run
from .outcome import Outcome
from .runner import first_failure, run_suite

__all__ = [
    "Backend",
    "Case",
    "Check",
    "Outcome",
    "Problem",
    "Verdict",
    "backends",
    "first_failure",
    "grid",
    "judge",
    "judge_lse",
    "needle",
    "report",
    "run",
    "run_suite",
    "small",
]
