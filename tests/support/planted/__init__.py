"""A readable paged attention and the faults that are planted in it: they prove the suite."""

from paged_mlx.testing import Backend

from . import walk


def reference() -> Backend:
    """The walk without a fault."""
    return Backend("reference", walk.attend, snippet="planted.reference()")
