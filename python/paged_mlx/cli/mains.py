"""The commands of mlx-lm that ours run, and the attributes of theirs that ours stand in for.

Imported by a command once it is known that mlx-lm is there.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from paged_mlx.forward.seams import Seam


def module(name: str) -> ModuleType:
    """A module of mlx-lm; ``mlx_lm.generate`` as an attribute is a function."""
    return importlib.import_module(f"mlx_lm.{name}")


_stand_ins: dict[str, Callable] = {}  # of the main that runs: function by attribute


def _standing_in(name: str) -> Callable:
    def make(before: Callable) -> Callable:
        def function(*arguments, **options) -> Any:
            ours = _stand_ins.get(name)
            return (
                before(*arguments, **options)
                if ours is None
                else ours(before, *arguments, **options)
            )

        return function

    return make


def _seam(name: str, attribute: str, command: str, does: str) -> Seam:
    when = f"`paged-mlx {command}` runs"
    return Seam(module(name), attribute, _standing_in(attribute), when, does)


SEAMS = {
    "generate": [_seam("generate", "load", "generate", "enables the model")],
    "chat": [
        _seam("chat", "load", "chat", "enables the model"),
        _seam("chat", "sharded_load", "chat", "enables the model"),
    ],
    "server": [_seam("server", "run", "serve", "enables models, and serves their figures too")],
}


def run_main(name: str, program: str, words: list[str], **stand_ins: Callable) -> None:
    """Run ``mlx_lm.<name>``'s ``main()``.

    Args:
        program: What it calls itself.
        words: Its arguments.
        stand_ins: Functions that are called for ``load`` and the like, with what they stand in
            for as the first argument.
    """
    seams = SEAMS[name]
    _stand_ins.update(stand_ins)
    try:
        for seam in seams:
            seam.install()
        with _called_as(program, words):
            module(name).main()
    finally:
        for seam in seams:
            seam.uninstall()
        _stand_ins.clear()


@contextlib.contextmanager
def _called_as(program: str, words: list[str]) -> Iterator[None]:
    """Let a ``main()`` that reads ``sys.argv`` find these words."""
    before, sys.argv = sys.argv, [program, *words]
    try:
        yield
    finally:
        sys.argv = before
