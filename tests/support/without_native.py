"""A pytest plugin that hides the native module, as where none was built for the mlx installed.

    PYTHONPATH=tests/support python -m pytest -p without_native tests/conformance

Tests marked ``native`` are about the native module itself, and left out.
"""

import sys
import warnings


class NoNativeModule:
    """Lets nobody import ``paged_mlx._ext``."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "paged_mlx._ext":
            raise ImportError("hidden by the tests")


sys.meta_path.insert(0, NoNativeModule())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import paged_mlx  # noqa: F401  once, with its warning out of the way


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if not item.get_closest_marker("native")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
