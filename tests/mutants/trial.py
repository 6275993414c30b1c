"""One mutant against its layer's suite, in a process of its own: ``python -m mutants.trial``.

Prints one line of JSON on stdout: ``{"case": ..., "reason": ...}``, both null for a mutant
that nobody saw.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial

from .mutant import Mutant, changed


class MutantModule:
    """Finds ``paged_mlx._ext`` at a path of its own."""

    def __init__(self, path: str):
        self.path = path

    def find_spec(self, name, path=None, target=None):
        if name == "paged_mlx._ext":
            return importlib.util.spec_from_file_location(name, self.path)
        return None


class ChangedText:
    """Plants a fault in the text of every kernel that includes its file."""

    def __init__(self, mutant: Mutant):
        self.mutant, self.applied = mutant, 0

    def __call__(self, dispatch: dict) -> dict:
        if self.mutant.find in dispatch["text"]:
            dispatch["text"] = changed(self.mutant, dispatch["text"])
            self.applied += 1
        return dispatch


def order(cases: dict, mutant: Mutant) -> list[str]:
    """The case that should see the mutant, then those about the same kernel, then the rest."""
    kernel = mutant.seen_by.partition(",")[0]
    rest = sorted(cases, key=lambda name: name.partition(",")[0] != kernel)
    return [mutant.seen_by] + [name for name in rest if name != mutant.seen_by]


def _reason(case: Callable[[], str | None]) -> str | None:
    """Why a case fails; what it raises is a reason."""
    try:
        return case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def try_kernel(mutant: Mutant) -> tuple[str | None, str | None]:
    """The case that saw a fault in the kernels' text, and how."""
    from .kernels_suite import CASES

    plant = ChangedText(mutant)
    for name in order(CASES, mutant):
        before = plant.applied
        reason = _reason(partial(CASES[name], plant))
        if reason and plant.applied == before:
            return None, f"{name} fails without the fault: {reason}"
        if reason:
            return name, reason
    return None, None if plant.applied else "its text was never launched"


def cases_of(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite of a mutant's layer, without a fault in the kernels' text."""
    return importlib.import_module(f".{mutant.layer}_suite", __package__).cases(mutant)


def try_module(mutant: Mutant) -> tuple[str | None, str | None]:
    """The case that saw a fault in the native module, which is already in place."""
    cases = cases_of(mutant)
    for name in order(cases, mutant):
        reason = _reason(cases[name])
        if reason:
            return name, reason
    return None, None


def main() -> None:
    from . import find

    mutant = find(sys.argv[1])
    if len(sys.argv) > 2:
        sys.meta_path.insert(0, MutantModule(sys.argv[2]))
    attempt = try_kernel if mutant.layer == "kernels" else try_module
    print(f"trying {mutant.seen_by}", file=sys.stderr)
    case, reason = attempt(mutant)
    print(json.dumps({"case": case, "reason": reason}))


if __name__ == "__main__":
    main()
