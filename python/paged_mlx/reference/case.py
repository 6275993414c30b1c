"""A ``Case`` names one call of paged attention; ``Case.build`` makes its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import needle
from .arrays import assemble, draw_contexts, draw_queries
from .call import Call
from .problem import Problem


@dataclass(frozen=True, repr=False)
class Case(Call):
    """One call of paged attention. Small numbers, one seed; equal cases build equal arrays."""

    def build(self) -> Problem:
        """The arrays of this case. Needles are planted by ``needle.build``."""
        if self.values == "needles":
            return needle.build(self)[0]
        rng = np.random.default_rng([self.seed, 1])
        keys, values = draw_contexts(self, rng)
        return assemble(self, draw_queries(self, rng), keys, values)


def with_options(softcap: bool, alibi: bool, sinks: bool, mask: str | None) -> dict[str, Any]:
    """Fields of a case that has these options, with values that matter."""
    return {
        "softcap": 4.0 if softcap else None,
        "alibi": 1.0 if alibi else 0.0,
        "sinks": "random" if sinks else None,
        "mask": mask,
    }
