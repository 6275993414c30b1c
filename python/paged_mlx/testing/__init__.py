"""The conformance suite: can a paged attention tell a right page from a wrong one?

numpy only. A backend is a function from a ``Problem`` to ``(out, lse)``::

    from paged_mlx.testing import Case

    problem = Case(dtype="float16", sequences=((1, 300), (7, 40))).build()
    out, lse = my_attention(problem.q, problem.k_pages, ...)
    assert problem.judge(out, lse), problem.judge(out, lse).reason

``python -m paged_mlx.testing`` runs the whole suite and prints a table.
"""

from .case import Case
from .problem import Problem
from .yardstick import Verdict, judge, judge_lse

__all__ = ["Case", "Problem", "Verdict", "judge", "judge_lse"]
